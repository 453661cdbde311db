def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes); 0 threads: the runtime's own choice."""
    import numpy as np
    from MNN import expr, nn

    model = nn.load_module_from_file(
        file, ["input"], ["output"], precision_mode=expr.PrecisionMode.High, thread_num=threads or 4
    )

    def run(x):
        given = expr.const(np.ascontiguousarray(x), list(x.shape), expr.NCHW)
        return np.array(expr.convert(model.forward([given])[0], expr.NCHW).read()).reshape(len(x), -1)

    return run
