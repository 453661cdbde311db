// Runs an AOTInductor package: ./aoti MODEL.pt2 INPUTS.bin CHANNELS HEIGHT WIDTH
//
// The package holds native code for the processor it was compiled on. INPUTS.bin: float32 values of one or more images,
// NCHW, normalised as the manifest says. Prints one line of scores an image. Build against the LibTorch of the Python
// wheel ($T is python -c "import torch; print(torch.__path__[0])"):
//   g++ -std=c++20 -O2 aoti.cpp -o aoti -I$T/include -I$T/include/torch/csrc/api/include -L$T/lib \
//       -Wl,-rpath,$T/lib -Wl,--no-as-needed -Wl,--allow-shlib-undefined -ltorch -ltorch_cpu -lc10
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

static torch::Tensor read_inputs(const char* path, int64_t c, int64_t h, int64_t w) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  std::vector<char> raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const int64_t image = c * h * w * static_cast<int64_t>(sizeof(float));
  TORCH_CHECK(image > 0 && !raw.empty() && raw.size() % image == 0, path, " holds no whole number of images");
  const int64_t n = static_cast<int64_t>(raw.size()) / image;
  return torch::from_blob(raw.data(), {n, c, h, w}, torch::kFloat32).clone();
}

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 INPUTS.bin CHANNELS HEIGHT WIDTH\n", argv[0]);
    return 2;
  }
  try {
    c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader network(argv[1]);
    torch::Tensor x = read_inputs(argv[2], std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]));
    torch::Tensor scores = network.run({x}).at(0).to(torch::kFloat32).contiguous();
    for (int64_t i = 0; i < scores.size(0); ++i) {
      for (int64_t k = 0; k < scores.size(1); ++k) std::printf("%s%.9g", k ? " " : "", scores[i][k].item<float>());
      std::printf("\n");
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
