// Classifies images with this bundle's ONNX file on iOS and macOS. Add this and the file to the app's target, and the
// Swift package onnxruntime-swift-package-manager (or the pod onnxruntime-objc).
//
//   for answer in try Classifier().classify(image, 3) { print(answer.label, answer.probability) }

import CoreGraphics
import Foundation

#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings
#else
import onnxruntime_objc
#endif

@COMMON@

/// Loads the model once; not for the main thread.
final class Classifier {
    private let environment: ORTEnv
    private let session: ORTSession

    init(threads: Int32 = 1) throws {
        guard let path = Bundle.main.path(forResource: Model.file, ofType: nil) else {
            throw ClassifierError("\(Model.file) is not in the app")
        }
        environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
    }

    func classify(_ image: CGImage, _ k: Int = 3) throws -> [Model.Answer] {
        try Model.answers(scores(pixels(of: image)), k)
    }

    /// Scores before softmax, one a class.
    func scores(_ rgba: [UInt8]) throws -> [Float] {
//: if float
        let values = Model.normalize(rgba)
        let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
        let shape = [1, Model.channels, Model.height, Model.width].map { NSNumber(value: $0) }
        let input = try ORTValue(tensorData: data, elementType: .float, shape: shape)
//: end
//: if uint8
        let values = Model.bytes(rgba)
        let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
        let shape = [1, Model.height, Model.width, Model.channels].map { NSNumber(value: $0) }
        let input = try ORTValue(tensorData: data, elementType: .uInt8, shape: shape)
//: end
        let outputs = try session.run(withInputs: [Model.input: input], outputNames: [Model.output], runOptions: nil)
        guard let output = outputs[Model.output] else { throw ClassifierError("\(Model.output) is not in the model") }
        // The data lies in the value: it must live until the numbers are copied.
        return try withExtendedLifetime(output) {
            Data(referencing: try output.tensorData()).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        }
    }
}
