def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes); 0 threads: the runtime's own choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
