import pytest
import torch

from danet.winograd.transforms import FourByFour, Transforms, TwoByTwo


@pytest.mark.parametrize("transforms", [TwoByTwo(), FourByFour()])
def test_one_way_it_is_the_correlation(transforms: Transforms) -> None:
    """A^T [(G g) * (B^T d)] against the sum that defines it, written out."""
    torch.manual_seed(0)
    inputs = torch.randn(transforms.outputs + 2, dtype=torch.float64)
    taps = torch.randn(3, dtype=torch.float64)
    filters = torch.tensor(transforms.filters(), dtype=torch.float64)
    transformed = torch.empty_like(inputs)
    transforms.inputs(inputs.unbind(), transformed)
    products = transformed * (filters @ taps)
    outputs = torch.stack(list(transforms.combine(products, torch.empty(1).double()[0])))
    expected = [
        sum(float(inputs[at + tap] * taps[tap]) for tap in range(3))
        for at in range(transforms.outputs)
    ]
    torch.testing.assert_close(outputs, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("transforms", [TwoByTwo(), FourByFour()])
def test_spreading_is_the_adjoint_of_combining(transforms: Transforms) -> None:
    """<A^T p, d> = <p, A d>."""
    torch.manual_seed(0)
    products = torch.randn(transforms.outputs + 2, dtype=torch.float64)
    gradients = torch.randn(transforms.outputs, dtype=torch.float64)
    spread = torch.empty_like(products)
    transforms.spread(gradients.unbind(), spread)
    spare = torch.empty(1, dtype=torch.float64)[0]
    combined = torch.stack(list(transforms.combine(products.clone(), spare)))
    torch.testing.assert_close(products @ spread, combined @ gradients)


def test_the_points_amplify_rounding_less_than_the_usual_ones() -> None:
    """Of independent inputs, taps and rounding errors: the variance of an output's error."""

    def amplification(transforms: FourByFour) -> float:
        one_at_a_time = torch.eye(6, dtype=torch.float64)
        of_inputs = torch.empty(6, 6, dtype=torch.float64)
        transforms.inputs(one_at_a_time.unbind(), of_inputs)
        of_products = torch.stack(
            list(transforms.combine(one_at_a_time.clone(), torch.empty(6, dtype=torch.float64)))
        )
        of_taps = torch.tensor(transforms.filters(), dtype=torch.float64)
        variances = of_inputs.square().sum(1) * of_taps.square().sum(1)
        return float((of_products.square() @ variances).mean())

    usual = FourByFour()
    usual.near, usual.far = 1.0, 2.0
    assert amplification(FourByFour()) < amplification(usual) / 2
