"""From a trained vision model and a budget to verified files that run on the device."""
__version__ = "0.1.0"
