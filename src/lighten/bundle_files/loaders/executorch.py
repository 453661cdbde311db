def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes); 0 threads: the runtime's own choice."""
    import numpy as np
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda x: np.concatenate([method.execute((torch.from_numpy(i[None]),))[0].numpy() for i in x])
