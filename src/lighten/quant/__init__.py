"""The numerical core: which range, which bits, decided once in torch for every runtime."""

from lighten.kit.quiet import quiet

with quiet():  # torchao logs while it is imported
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401
