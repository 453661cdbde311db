def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes); 0 threads: the runtime's own choice."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.num_threads = threads or net.opt.num_threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(file)
    net.load_model(file.removesuffix(".param") + ".bin")

    def one(image):
        work = net.create_extractor()
        work.input("in0", ncnn.Mat(np.ascontiguousarray(image)).clone())
        return np.array(work.extract("out0")[1]).reshape(-1)

    return lambda x: np.stack([one(image) for image in x])
