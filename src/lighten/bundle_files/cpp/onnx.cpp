// Runs this bundle's ONNX file in ONNX Runtime: ./run MODEL.onnx IMAGE.rgb [THREADS]
//
// IMAGE.rgb: the bytes of one or more images of @HEIGHT@ x @WIDTH@ pixels (height, width, channel; @ORDER@), scaled
// and cut as manifest.json says; the `pixels` of golden.npz are such images. Prints one line of scores an image.
//   Debian and Ubuntu that have libonnxruntime-dev: g++ -std=c++17 -O2 run.cpp -o run -I/usr/include/onnxruntime -lonnxruntime
//   The library of the Python wheel ($T is python -c "import onnxruntime; print(onnxruntime.__path__[0])") and headers in $H
//   (lighten's scripts/onnxruntime_headers.sh $H, or ONNX Runtime's release archive):
//     ln -s $T/capi/libonnxruntime.so.* libonnxruntime.so.1
//     g++ -std=c++17 -O2 run.cpp -o run -I$H libonnxruntime.so.1 -Wl,-rpath,'$ORIGIN'
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace model {
constexpr const char* INPUT = @INPUT@;
constexpr const char* OUTPUT = @OUTPUT@;
constexpr int64_t HEIGHT = @HEIGHT@, WIDTH = @WIDTH@, CHANNELS = @CHANNELS@;
constexpr int64_t SIZE = HEIGHT * WIDTH * CHANNELS;
//: if float
constexpr double MEAN[CHANNELS] = {@MEAN@};
constexpr double STD[CHANNELS] = {@STD@};
constexpr std::array<int64_t, 4> SHAPE = {1, CHANNELS, HEIGHT, WIDTH};
using Element = float;

// (pixel / 255 - mean) / std in float32, channels first.
static std::vector<float> input_of(const uint8_t* pixels) {
  std::vector<float> out(SIZE);
  for (int64_t i = 0; i < HEIGHT * WIDTH; ++i)
    for (int64_t c = 0; c < CHANNELS; ++c) {
      const float mean = static_cast<float>(MEAN[c]), std = static_cast<float>(STD[c]);
      out[c * HEIGHT * WIDTH + i] = (static_cast<float>(pixels[i * CHANNELS + c]) / 255.0f - mean) / std;
    }
  return out;
}
//: end
//: if uint8
constexpr std::array<int64_t, 4> SHAPE = {1, HEIGHT, WIDTH, CHANNELS};
using Element = uint8_t;

// The pixels as they are: the file normalises them itself.
static std::vector<uint8_t> input_of(const uint8_t* pixels) { return {pixels, pixels + SIZE}; }
//: end
}  // namespace model

static std::vector<char> read_images(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  std::vector<char> raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (raw.empty() || raw.size() % model::SIZE != 0)
    throw std::runtime_error(std::string(path) + " holds no whole number of images: it has " + std::to_string(raw.size()) +
                             " bytes, and one image has " + std::to_string(model::SIZE));
  return raw;
}

static Ort::Session load(const Ort::Env& environment, const char* path, int threads) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");  // spinning threads slow down everything else
  return Ort::Session(environment, std::filesystem::path(path).c_str(), options);
}

static void print_scores(Ort::Session& session, const char* pixels) {
  std::vector<model::Element> values = model::input_of(reinterpret_cast<const uint8_t*>(pixels));
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<model::Element>(memory, values.data(), values.size(), model::SHAPE.data(),
                                                              model::SHAPE.size());
  const auto answer = session.Run(Ort::RunOptions{nullptr}, &model::INPUT, &input, 1, &model::OUTPUT, 1);
  const float* scores = answer[0].GetTensorData<float>();
  const size_t classes = answer[0].GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t k = 0; k < classes; ++k) std::printf("%s%.9g", k ? " " : "", scores[k]);
  std::printf("\n");
}

int main(int argc, char** argv) {
  const int threads = argc == 4 ? std::atoi(argv[3]) : 1;
  if (argc < 3 || argc > 4 || threads < 1) {
    std::fprintf(stderr, "usage: %s MODEL.onnx IMAGE.rgb [THREADS]\n", argv[0]);
    return 2;
  }
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    std::fprintf(stderr, "ONNX Runtime %s is older than the headers\n", OrtGetApiBase()->GetVersionString());
    return 1;
  }
  try {
    const std::vector<char> images = read_images(argv[2]);
    const Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "run");
    Ort::Session session = load(environment, argv[1], threads);
    for (size_t start = 0; start < images.size(); start += model::SIZE) print_scores(session, &images[start]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
