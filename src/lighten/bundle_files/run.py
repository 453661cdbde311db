"""Run this bundle on images: python run.py photo.jpg [more.jpg ...] [--zh]. Needs numpy, Pillow and the runtime."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text("utf-8"))
HOW = MANIFEST["preprocessing"]
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def load_model(threads=0):
    """A function from float32 inputs (N, C, H, W) to scores (N, classes). `threads` 0 is the runtime's own choice."""
    return globals()["load_" + MANIFEST["model"]["format"]](str(HERE / MANIFEST["model"]["file"]), threads)


def load_onnx(file, threads):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def load_openvino(file, threads):
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = ov.Core().compile_model(file, "CPU", settings)
    return lambda x: model({0: x})[model.output(0)]


def load_litert(file, threads):
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(file, num_threads=threads or None)
    model.allocate_tensors()
    source, target = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]

    def one(image):  # the file takes one image, channels last
        model.set_tensor(source, np.ascontiguousarray(image.transpose(1, 2, 0)[None]))
        model.invoke()
        return model.get_tensor(target)[0]

    return lambda x: np.stack([one(image) for image in x])


def load_ncnn(file, threads):
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads or net.opt.num_threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(file)
    net.load_model(str(HERE / MANIFEST["model"]["companions"][0]))

    def one(image):
        work = net.create_extractor()
        work.input("in0", ncnn.Mat(np.ascontiguousarray(image)).clone())
        return np.array(work.extract("out0")[1]).reshape(-1)

    return lambda x: np.stack([one(image) for image in x])


def load_mnn(file, threads):
    from MNN import expr, nn

    model = nn.load_module_from_file(
        file, ["input"], ["output"], precision_mode=expr.PrecisionMode.High, thread_num=threads or 4
    )

    def run(x):
        given = expr.const(np.ascontiguousarray(x), list(x.shape), expr.NCHW)
        return np.array(expr.convert(model.forward([given])[0], expr.NCHW).read()).reshape(len(x), -1)

    return run


def load_torchscript(file, threads):
    import torch

    model = torch.jit.load(file, map_location="cpu").eval()

    def run(x):
        with torch.inference_mode():
            return model(torch.from_numpy(x)).float().numpy()

    return run


def load_aoti(file, threads):
    import torch

    model = torch._inductor.aoti_load_package(file)

    def run(x):
        with torch.inference_mode():
            return model(torch.from_numpy(x)).float().numpy()

    return run


def load_executorch(file, threads):
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda x: np.concatenate([method.execute((torch.from_numpy(i[None]),))[0].numpy() for i in x])


def pixels(path):
    """The image as the model was calibrated on it: uint8 (H, W, C)."""
    with Image.open(path) as image:
        if image.width * image.height > 64_000_000:
            sys.exit(f"{path}: too large ({image.width} x {image.height} pixels)")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        image = image.convert("L" if HOW["channel_order"] == "GRAY" else "RGB")
    width, height = HOW["width"], HOW["height"]
    size = (width, height)
    if HOW["mode"] == "crop":
        short, (w, h) = HOW["resize"], image.size
        size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if image.size != size:
        image = image.resize(size, FILTERS[HOW["interpolation"]])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    array = np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    return array[..., ::-1] if HOW["channel_order"] == "BGR" else array


def normalize(batch):
    """uint8 (N, H, W, C) to float32 (N, C, H, W)."""
    mean, std = (np.asarray(HOW[k], np.float32) for k in ("mean", "std"))
    scaled = (batch.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def main():
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    if not paths or HOW is None:
        sys.exit(__doc__ if HOW else "This model takes ready float inputs, not images: see the README.")
    model, key = load_model(), "name_zh" if "--zh" in sys.argv else "name"
    for path in paths:
        scores = model(normalize(pixels(path)[None]))[0].astype(np.float64)
        share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = np.argsort(-share)[:3]
        print(path, "  ".join(f"{MANIFEST['labels'][k][key]} {100 * share[k]:.1f} %" for k in best))


if __name__ == "__main__":
    main()
