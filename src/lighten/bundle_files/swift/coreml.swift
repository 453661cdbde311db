// Classifies images with this bundle's Core ML package on iOS and macOS. Add this and the .mlpackage to the app's target:
// Xcode compiles it to a .mlmodelc of the same name.
//
//   for answer in try Classifier().classify(image, 3) { print(answer.label, answer.probability) }

import CoreGraphics
import CoreML
import Foundation

@COMMON@

/// Loads the model once, for one image at a time; not for the main thread.
final class Classifier {
    private let model: MLModel

    /// `compiled` is the .mlmodelc; of a package that the app has fetched it is what `MLModel.compileModel(at:)` makes.
    init(compiled: URL? = nil, units: MLComputeUnits = .all) throws {
        let name = (Model.file as NSString).deletingPathExtension
        guard let url = compiled ?? Bundle.main.url(forResource: name, withExtension: "mlmodelc") else {
            throw ClassifierError("\(Model.file) is not in the app")
        }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        model = try MLModel(contentsOf: url, configuration: configuration)
    }

    func classify(_ image: CGImage, _ k: Int = 3) throws -> [Model.Answer] {
        try Model.answers(scores(pixels(of: image)), k)
    }

    /// Scores before softmax, one a class.
    func scores(_ rgba: [UInt8]) throws -> [Float] {
        let values = Model.normalize(rgba)
        let shape = [1, Model.channels, Model.height, Model.width].map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: .float32)
        array.dataPointer.bindMemory(to: Float.self, capacity: values.count).update(from: values, count: values.count)
        let input = try MLDictionaryFeatureProvider(dictionary: [Model.input: array])
        guard let output = try model.prediction(from: input).featureValue(for: Model.output)?.multiArrayValue else {
            throw ClassifierError("\(Model.output) is not in the model")
        }
        return MLShapedArray<Float>(converting: output).scalars
    }
}
