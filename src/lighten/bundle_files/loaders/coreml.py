def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes), on macOS; Core ML chooses its threads."""
    import coremltools as ct
    import numpy as np

    model = ct.models.MLModel(str(Path(file).parent))
    return lambda x: np.concatenate([model.predict({"input": one[None]})["output"] for one in x])
