"""DANet on every family of timm: builds, runs forward and backward, saves, loads and predicts.

Of each family (a module of timm.models) the smallest network is taken, without weights, each in a
process of its own. Pictures have sides that no stride divides.

    python benchmarks/timm_families.py
"""

import argparse
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection

import timm
import torch
from results_file import add_results_option, read_rows, write_rows

import danet
from danet.optimize import optimize_for_inference

SIZES = ((97, 131), (70, 101), (257, 300))
SECONDS = 300


def smallest_of(families: list[str]) -> dict[str, tuple[str, float]]:
    """Each family's smallest network and its millions of parameters."""
    found = {}
    for family in sorted(families):
        sizes = {}
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=0)
            # Some cannot be built without data; they are tried in earnest if nothing else is.
            except Exception:
                continue
            sizes[name] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        names = timm.list_models(module=family)
        if sizes:
            name = min(sizes, key=sizes.__getitem__)
            found[family] = (name, sizes[name])
        elif names:
            found[family] = (names[0], float("nan"))
    return found


def try_family(name: str, results: Connection) -> None:
    """Sends the outcome: how the size is handled, and "ok" or what went wrong."""
    sys.stderr = sys.stdout
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = danet.DANet(
            3, name, pretrained_backbone=False, head_channels=32, key_channels=8
        ).train()
        handling = "dilated" if model.backbone.size_multiple == 1 else "resized"
        if model.backbone.fixed_size is not None:
            handling = "resized from {}x{}".format(*model.backbone.fixed_size)
        for height, width in SIZES:
            output = model(torch.randn(2, 3, height, width))
            stride = model.backbone.output_stride
            assert output.fused.shape == (2, 3, -(-height // stride), -(-width // stride))
            sum(logits.square().mean() for logits in output).backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.eval().save_pretrained(folder)
            images = torch.randn(1, 3, *SIZES[0])
            expected = model.predict_logits(images)
            read = danet.DANet.from_pretrained(folder)
            torch.testing.assert_close(read.predict_logits(images), expected)
            fast = optimize_for_inference(read, bfloat16=False, compile_graph=False)
            difference = fast.predict_logits(images).sub(expected).abs().max()
            assert difference < 1e-4 * expected.abs().max(), f"prediction differs by {difference}"
        note = f"{len(missing)} parameters without gradient" if missing else ""
        results.send((handling, "ok", note))
    # Whatever a family fails with is the finding.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        results.send(("", "no feature maps" if "feature maps" in reason else "fails", reason))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument(
        "--families",
        nargs="+",
        choices=timm.list_modules(),
        metavar="FAMILY",
        help="renew only these modules of timm.models",
    )
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    rows = []
    for family, (name, parameters) in smallest_of(args.families or timm.list_modules()).items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=try_family, args=(name, sender))
        process.start()
        sender.close()
        outcome = ("", "fails", f"no answer in {SECONDS} s")
        try:
            if receiver.poll(SECONDS):
                outcome = receiver.recv()
        except EOFError:
            outcome = ("", "fails", "the process died")
        process.kill()
        process.join()
        row = {"family": family, "model": name, "parameters_M": round(parameters, 1)}
        row |= dict(zip(("sizes", "result", "note"), outcome, strict=True))
        rows.append(row | {"timm": timm.__version__, "torch": torch.__version__})
        print(*rows[-1].values(), flush=True)
    path = args.results / "timm_families.csv"
    kept = {row["family"]: row for row in read_rows(path)} if args.families else {}
    kept |= {row["family"]: row for row in rows}
    write_rows(path, [kept[family] for family in sorted(kept)])


if __name__ == "__main__":
    main()
