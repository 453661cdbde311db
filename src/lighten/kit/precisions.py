"""Which pairs of weights and activations mean something to an exporter, and why the others do not."""

from __future__ import annotations

from lighten.types import FLOATS, Precision

INTEGERS = ("int8", "int4")
STATIC = tuple((w, a) for w in INTEGERS for a in INTEGERS)
WEIGHT_ONLY = tuple((w, "float32") for w in INTEGERS)
DYNAMIC = tuple((w, "dynamic") for w in INTEGERS)
FLOAT = tuple((f, f) for f in FLOATS)


def impossible(precision: Precision) -> str | None:
    """Why no file can be given at this precision, or None: one clear reason."""
    default = precision.weights, precision.activations
    if default not in (*FLOAT, *STATIC, *WEIGHT_ONLY, *DYNAMIC):
        return _unknown(*default)
    if default in FLOAT:
        return "a float network has no layers at another precision" if precision.exceptions else None
    pairs = (*FLOAT, *WEIGHT_ONLY, *(STATIC if default in STATIC else DYNAMIC))
    for layer, *pair in precision.exceptions:
        if tuple(pair) not in pairs:
            return f"{layer}: {_unknown(*pair)} beside {default[0]} weights with {default[1]} activations"
    return None


def is_dynamic(precision: Precision) -> bool:
    """Whether any layer's input is quantized as it runs."""
    return "dynamic" in (precision.activations, *(activations for *_, activations in precision.exceptions))


def has_int4(precision: Precision) -> bool:
    """Whether any weight is 4 bits; only such ONNX files need a newer operator set."""
    return "int4" in (precision.weights, *(weights for _, weights, _ in precision.exceptions))


def _unknown(weights: str, activations: str) -> str:
    return f"{weights} weights with {activations} activations are not written"
