def load_model(file, threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes), on the GPU that build.sh was run on."""
    import tensorrt as trt
    import torch

    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(Path(file[:-9] + ".engine").read_bytes())  # .trt.onnx
    context, (given, answer) = engine.create_execution_context(), [engine.get_tensor_name(k) for k in (0, 1)]

    def run(x):
        x = torch.from_numpy(x).cuda()
        context.set_input_shape(given, tuple(x.shape))
        out = torch.empty(tuple(context.get_tensor_shape(answer)), device="cuda")
        context.set_tensor_address(given, x.data_ptr())
        context.set_tensor_address(answer, out.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return out.float().cpu().numpy()

    return run
