"""Coverage-guided fuzzing of everything that reads bytes of strangers.

A reader may accept its input or raise a UserError; anything else, or 20 seconds, or 8 GiB, is a
fault. Each runs in a process of its own, with every file it writes in a temporary folder.

    make fuzz    # or: pip install -e '.[fuzz]'; python benchmarks/fuzz.py --runs 100000
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import atheris

with atheris.instrument_imports(include=["danet", "PIL", "yaml", "tarfile", "zipfile"]):
    import numpy as np
    import onnx
    import openvino
    import torch
    import yaml
    from PIL import Image
    from scipy.io import savemat

    import danet
    from danet import data, jsonl, manifest, video, work_items
    from danet.data import images, mat
    from danet.export.predictor import ExportedPredictor
    from danet.interop import convert, foreign
    from danet.model_folder import read_folder
    from danet.recipes import load_recipe, recipe_names
    from danet.training import checkpoint

from results_file import add_results_option, commit, read_rows, write_rows

from danet.data.scenes import render
from danet.errors import UserError
from danet.inputs import Input

SECONDS, MEBIBYTES = 20, 8192
RUNS_OF_A_PROCESS = 20_000  # the fuzzer's own memory grows


class Reader(NamedTuple):
    """Something that reads a file.

    Attributes:
        name: of the file.
        read: takes the file.
        seeds: contents to start from.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], Iterable[bytes]]


def pictures() -> Iterable[bytes]:
    generator = np.random.default_rng(0)
    color = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [(color, name) for name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")]
    forms += [(color.convert(mode), "PNG") for mode in ("L", "P", "LA", "RGBA", "1", "I;16")]
    forms += [(color.convert(mode), "TIFF") for mode in ("CMYK", "F", "I", "LAB")]
    for image, name in forms:
        buffer = io.BytesIO()
        image.save(buffer, name, **({"exif": exif} if name == "JPEG" else {}))
        yield buffer.getvalue()


def matlab_files() -> Iterable[bytes]:
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for content in ({"S": ids}, {"GTcls": {"Segmentation": ids}}):
        for compressed in (False, True):
            buffer = io.BytesIO()
            savemat(buffer, content, do_compression=compressed)
            yield buffer.getvalue()


def recipes() -> Iterable[bytes]:
    for name in recipe_names()[:6]:
        yield yaml.safe_dump(load_recipe(name).model_dump(mode="json")).encode()
    yield b"extends: demo\ntrain: {steps: 3}\n"
    yield b"a: &a [x, x]\nb: &b [*a, *a]\nextends: !!python/object/apply:os.system [id]\n"


def folder_of(network: danet.DANet) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return tuple(
            (Path(folder) / name).read_bytes() for name in ("config.json", "model.safetensors")
        )


def network() -> danet.DANet:
    options = {"head_channels": 4, "key_channels": 4, "auxiliary": False}
    return danet.DANet(2, "test_resnet", pretrained_backbone=False, **options)


def small_tensors() -> Iterable[bytes]:
    yield from (b"\x08\0\0\0\0\0\0\0{}      ", folder_of(network())[1][:4000])
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield len(header).to_bytes(8, "little") + header + bytes(4)


def checkpoints() -> Iterable[bytes]:
    weights = {"decode_head.pam.gamma.scale": torch.ones(1), "a": torch.arange(6).view(2, 3)}
    contents = [weights, {"state_dict": weights, "meta": {"CLASSES": ("a", "b")}}]
    contents += [{"step": 3, "model": weights, "optimizer": {}, "average": None, "best": None}]
    for content in contents:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            yield buffer.getvalue()
    yield b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R."


def videos() -> Iterable[bytes]:
    import av

    for name, codec in (("mp4", "h264"), ("avi", "mpeg4"), ("webm", "vp9")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=name) as container:
            stream = container.add_stream(codec, rate=5, width=32, height=16)
            stream.pix_fmt = "yuv420p"
            for index in range(2):
                frame = av.VideoFrame.from_image(render(2, index)[0].resize((32, 16)))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        yield buffer.getvalue()


def manifests() -> Iterable[bytes]:
    entry = {"input": "a.png", "model": "0", "status": "ok", "mask": "a.png"}
    entry |= {
        "path": "/a.png",
        "size": 1,
        "mtime_ns": 1,
        "time": "2026-01-01T00:00:00.000000+00:00",
    }
    yield f"{json.dumps(entry)}\n{json.dumps([entry])}\n{{".encode()


def archives(kind: str) -> Iterable[bytes]:
    members = {"classes.txt": b"a\nb\n"}
    for part in ("images", "labels"):
        for split in ("train", "val"):
            buffer = io.BytesIO()
            Image.new("L", (2, 2)).save(buffer, "PNG")
            members[f"{part}/{split}/x.png"] = buffer.getvalue()
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    yield buffer.getvalue()


def exported_graph() -> bytes:
    """One convolution of a picture, with what `danet export` says about the classes."""
    kind = onnx.TensorProto.FLOAT
    weight = np.ones((2, 3, 1, 1), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["images", "weight"], ["logits"])],
        "m",
        [onnx.helper.make_tensor_value_info("images", kind, ["b", 3, "h", "w"])],
        [onnx.helper.make_tensor_value_info("logits", kind, ["b", 2, "h", "w"])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 9
    metadata = {"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]]}
    onnx.helper.set_model_props(model, {"danet": json.dumps(metadata)})
    return model.SerializeToString()


def openvino_graph() -> tuple[bytes, bytes]:
    """The same graph's .xml and .bin."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "m.onnx", Path(folder) / "m.xml"
        source.write_bytes(exported_graph())
        model = openvino.convert_model(source)
        model.set_rt_info('{"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]]}', ["danet"])
        openvino.save_model(model, path)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def read_exported(path: Path) -> None:
    ExportedPredictor(path).segment_batch(np.zeros((1, 32, 32, 3), np.uint8))


def read_openvino(path: Path) -> None:
    if not path.with_suffix(".bin").exists():
        path.with_suffix(".bin").write_bytes(openvino_graph()[1])
    read_exported(path)


def read_tar(path: Path) -> None:
    for picture in work_items.list_pictures([Input(path, "a")], overlay=False):
        picture.decoded()


def read_zip(path: Path) -> None:
    from danet.data.archives import _opened

    _opened.cache_clear()
    for split in ("train", "val"):
        for _ in data.open_dataset("folder", path, split):
            pass


def read_video(path: Path) -> None:
    with video._Reader(path) as reader:
        for _ in reader.frames():
            pass


def read_model_config(path: Path) -> None:
    if not (path.parent / "model.safetensors").exists():
        (path.parent / "model.safetensors").write_bytes(folder_of(network())[1])
    danet.DANet.from_pretrained(path.parent)


def read_model_weights(path: Path) -> None:
    if not (path.parent / "config.json").exists():
        (path.parent / "config.json").write_bytes(folder_of(network())[0])
    read_folder(path.parent)


def read_class_list(path: Path) -> None:
    data.dataset_spec("folder", path.parent)


def read_split_list(path: Path) -> None:
    from danet.data.files import read_names

    read_names(path)


def either_mat(path: Path) -> None:
    try:
        mat.open_sbd_label(path)
    finally:
        mat.open_coco_stuff_label(path)


def python_config(path: Path) -> None:
    foreign.literal_config(path.read_text(encoding="utf-8", errors="replace"))


READERS = {
    "picture": Reader("x.png", images.open_image, pictures),
    "label": Reader("x.png", images.open_label, pictures),
    "matlab label": Reader("x.mat", either_mat, matlab_files),
    "recipe": Reader("x.yaml", load_recipe, recipes),
    "model config": Reader("config.json", read_model_config, lambda: [folder_of(network())[0]]),
    "model weights": Reader("model.safetensors", read_model_weights, small_tensors),
    "foreign checkpoint": Reader("x.pth", convert.convert, checkpoints),
    "foreign safetensors": Reader("x.safetensors", convert.convert, small_tensors),
    "own checkpoint": Reader("last.ckpt", checkpoint.load_checkpoint, checkpoints),
    "config in Python": Reader(
        "x.py", python_config, lambda: [b"a = dict(b=[1, (2,)], c={'d': -1})"]
    ),
    "video": Reader("x.mp4", read_video, videos),
    "manifest": Reader(
        "manifest.jsonl", lambda p: manifest.finished_results(p.parent, "0"), manifests
    ),
    "metrics": Reader("metrics.jsonl", lambda p: list(jsonl.read_whole_lines(p)), manifests),
    "tar archive": Reader("x.tar", read_tar, lambda: archives("tar")),
    "zip archive": Reader("x.zip", read_zip, lambda: archives("zip")),
    "exported onnx": Reader("x.onnx", read_exported, lambda: [exported_graph()]),
    "exported openvino": Reader("x.xml", read_openvino, lambda: [openvino_graph()[0]]),
    "class list": Reader("classes.txt", read_class_list, lambda: [b"road 1 2 3\nsky\n"]),
    "split list": Reader("val.txt", read_split_list, lambda: [b"a\nb\n"]),
}


def fuzz(reader: Reader, runs: int, seed: int, folder: Path) -> None:
    """Runs in this process and leaves it."""
    corpus, inputs = folder / "corpus", folder / "inputs"
    for path in (corpus, inputs):
        path.mkdir(exist_ok=True)
    for index, content in enumerate(reader.seeds()):
        (corpus / str(index)).write_bytes(content)
    path = inputs / reader.name

    def one(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            reader.read(path)

    options = [f"-runs={runs}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEBIBYTES}"]
    options += ["-max_len=20000", "-len_control=0", f"-artifact_prefix={folder}/", f"-seed={seed}"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("--runs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        torch.set_num_threads(1)
        fuzz(READERS[args.readers[0]], args.runs, args.seed, args.inside)
    rows = []
    for name in args.readers:
        shared = Path("/dev/shm")
        place = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        row = {"reader": name, "executions": 0, "branches": 0, "seconds": 0, "faults": 0}
        start = time.monotonic()
        seed = args.seed - 1
        while row["executions"] < args.runs and not row["faults"]:
            seed += 1
            command = [sys.executable, __file__, "--readers", name, "--inside", str(place)]
            command += ["--runs", str(min(args.runs, RUNS_OF_A_PROCESS)), "--seed", str(seed)]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
            counts = re.findall(r"^#(\d+)\s+\w+(?:.*? cov: (\d+))?", done.stderr, re.MULTILINE)
            row["executions"] += int(counts[-1][0]) if counts else 0
            row["branches"] = max(row["branches"], int(counts[-1][1] or 0) if counts else 0)
            row["faults"] = int(done.returncode != 0)
        row["seconds"] = round(time.monotonic() - start)
        row["commit"] = commit()
        print(row, flush=True)
        if row["faults"]:
            print(done.stdout[-2000:], done.stderr[-1000:], f"the input is in {place}", sep="\n")
        else:
            shutil.rmtree(place)
        rows.append(row)
    path = args.results / "fuzz.csv"
    before = [row for row in read_rows(path) if row["reader"] not in args.readers]
    write_rows(path, [*before, *rows])
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
