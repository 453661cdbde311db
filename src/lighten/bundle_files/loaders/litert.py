def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes); 0 threads: the runtime's own choice."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(file, num_threads=threads or None)
    model.allocate_tensors()
    source, target = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]

    def one(image):  # the file takes one image, channels last
        model.set_tensor(source, np.ascontiguousarray(image.transpose(1, 2, 0)[None]))
        model.invoke()
        return model.get_tensor(target)[0]

    return lambda x: np.stack([one(image) for image in x])
