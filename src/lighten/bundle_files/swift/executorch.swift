// Classifies images with this bundle's ExecuTorch file on iOS and macOS. Add this and the file to the app's target, and
// ExecuTorch's Swift package with executorch, backend_xnnpack and kernels_optimized, linked with -all_load.
//
//   for answer in try Classifier().classify(image, 3) { print(answer.label, answer.probability) }

import CoreGraphics
import ExecuTorch
import Foundation

@COMMON@

/// Loads the model once, for one image at a time; not for the main thread.
final class Classifier {
    private let module: Module

    init() throws {
        guard let path = Bundle.main.path(forResource: Model.file, ofType: nil) else {
            throw ClassifierError("\(Model.file) is not in the app")
        }
        module = Module(filePath: path)
        try module.load("forward")
    }

    func classify(_ image: CGImage, _ k: Int = 3) throws -> [Model.Answer] {
        try Model.answers(scores(pixels(of: image)), k)
    }

    /// Scores before softmax, one a class.
    func scores(_ rgba: [UInt8]) throws -> [Float] {
        let shape = [1, Model.channels, Model.height, Model.width]
        let output: Tensor<Float> = try module.forward(Tensor<Float>(Model.normalize(rgba), shape: shape))
        return output.scalars()
    }
}
