"""The numerical core: which range, which bits, decided once in torch for every runtime."""
