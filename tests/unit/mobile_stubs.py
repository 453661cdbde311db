"""Stand-ins for Android's and Apple's classes and for the runtimes on them, to check the types of the examples by."""

ANDROID = {
    "android.content.res": "class AssetManager { fun open(name: String): java.io.InputStream = TODO(name) }",
    "android.content": """abstract class Context {
        abstract val assets: android.content.res.AssetManager
        abstract val filesDir: java.io.File
    }""",
    "android.graphics": """abstract class Bitmap {
        abstract val width: Int
        abstract val height: Int
        abstract fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int)
        companion object { fun createScaledBitmap(from: Bitmap, width: Int, height: Int, filter: Boolean): Bitmap = TODO() }
    }""",
    "ai.onnxruntime": """import java.nio.*
    enum class OnnxJavaType { UINT8 }
    interface OnnxValue : java.io.Closeable
    interface OnnxTensorLike : OnnxValue
    abstract class OnnxTensor : OnnxTensorLike {
        abstract val floatBuffer: FloatBuffer
        companion object {
            fun createTensor(at: OrtEnvironment, data: FloatBuffer, shape: LongArray): OnnxTensor = TODO()
            fun createTensor(at: OrtEnvironment, data: ByteBuffer, shape: LongArray, type: OnnxJavaType): OnnxTensor = TODO()
        }
    }
    abstract class OrtEnvironment {
        abstract fun createSession(model: ByteArray, options: OrtSession.SessionOptions): OrtSession
        companion object { fun getEnvironment(): OrtEnvironment = TODO() }
    }
    abstract class OrtSession : java.io.Closeable {
        abstract fun run(inputs: Map<String, OnnxTensorLike>, outputs: Set<String>): Result
        abstract class Result : java.io.Closeable { abstract fun get(index: Int): OnnxValue }
        class SessionOptions : java.io.Closeable {
            fun setIntraOpNumThreads(count: Int) { TODO("$count") }
            override fun close() = Unit
        }
    }""",
    "com.google.ai.edge.litert": """import android.content.res.AssetManager
    enum class Accelerator { CPU, GPU, NPU }
    abstract class TensorBuffer : java.io.Closeable {
        abstract fun writeFloat(data: FloatArray)
        abstract fun readFloat(): FloatArray
    }
    class Environment
    abstract class CompiledModel : java.io.Closeable {
        class Options(vararg val accelerators: Accelerator)
        abstract fun createInputBuffers(): List<TensorBuffer>
        abstract fun createOutputBuffers(): List<TensorBuffer>
        abstract fun run(inputs: List<TensorBuffer>, outputs: List<TensorBuffer>)
        companion object {
            fun create(from: AssetManager, name: String, options: Options, at: Environment? = null): CompiledModel = TODO()
        }
    }""",
    "org.pytorch.executorch": """abstract class Tensor {
        abstract val dataAsFloatArray: FloatArray
        companion object { fun fromBlob(data: FloatArray, shape: LongArray): Tensor = TODO() }
    }
    abstract class EValue {
        abstract fun toTensor(): Tensor
        companion object { fun from(tensor: Tensor): EValue = TODO() }
    }
    abstract class Module {
        abstract fun forward(vararg inputs: EValue): Array<EValue>
        abstract fun destroy()
        companion object { fun load(path: String?, mode: Int = 0, threads: Int = 0): Module = TODO() }
    }""",
}
"""What the examples use of Android and of the runtimes, as their documentation has it: enough to check types by.

Closeable stands for AutoCloseable, whose `use` Debian's Kotlin (1.3) lacks."""
APPLE = {
    "CoreGraphics": """import Foundation
    public final class CGImage { public let width = 1, height = 1 }
    public final class CGColorSpace {
        public static let sRGB = "sRGB"
        public init?(name: String) {}
    }
    public enum CGImageAlphaInfo: UInt32 { case noneSkipLast = 5 }
    public enum CGInterpolationQuality { case none, low, medium, high }
    public final class CGContext {
        public var interpolationQuality = CGInterpolationQuality.low
        public init?(
            data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int, bytesPerRow: Int,
            space: CGColorSpace, bitmapInfo: UInt32) {}
        public func draw(_ image: CGImage, in place: CGRect) {}
    }""",
    "CoreML": """import Foundation
    public enum MLComputeUnits { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }
    public enum MLMultiArrayDataType { case double, float32, float16, int32 }
    public final class MLModelConfiguration {
        public init() {}
        public var computeUnits = MLComputeUnits.all
    }
    public final class MLMultiArray {
        public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {}
        public var dataPointer: UnsafeMutableRawPointer { fatalError() }
    }
    public struct MLShapedArray<Scalar> {
        public init(converting: MLMultiArray) {}
        public var scalars: [Scalar] { [] }
    }
    public final class MLFeatureValue { public var multiArrayValue: MLMultiArray? }
    public protocol MLFeatureProvider { func featureValue(for name: String) -> MLFeatureValue? }
    public final class MLDictionaryFeatureProvider: MLFeatureProvider {
        public init(dictionary: [String: Any]) throws {}
        public func featureValue(for name: String) -> MLFeatureValue? { nil }
    }
    public final class MLModel {
        public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {}
        public func prediction(from input: MLFeatureProvider) throws -> MLFeatureProvider { input }
    }""",
    "onnxruntime_objc": """import Foundation
    public enum ORTLoggingLevel { case verbose, info, warning, error, fatal }
    public enum ORTTensorElementDataType { case undefined, float, int8, uInt8, int32, int64 }
    public final class ORTEnv { public init(loggingLevel: ORTLoggingLevel) throws {} }
    public final class ORTRunOptions {}
    public final class ORTSessionOptions {
        public init() throws {}
        public func setIntraOpNumThreads(_ count: Int32) throws {}
    }
    public final class ORTValue {
        public init(tensorData: NSMutableData, elementType: ORTTensorElementDataType, shape: [NSNumber]) throws {}
        public func tensorData() throws -> NSMutableData { fatalError() }
    }
    public final class ORTSession {
        public init(env: ORTEnv, modelPath: String, sessionOptions: ORTSessionOptions?) throws {}
        public func run(withInputs: [String: ORTValue], outputNames: Set<String>, runOptions: ORTRunOptions?) throws
            -> [String: ORTValue] { [:] }
    }""",
    "ExecuTorch": """
    public protocol Scalar {}
    extension Float: Scalar {}
    public protocol ValueConvertible {}
    public protocol ValueSequenceConstructible {}
    public struct Value {}
    extension Array: ValueSequenceConstructible where Element == Value {}
    public final class Tensor<T: Scalar>: ValueConvertible, ValueSequenceConstructible {
        public init(_ scalars: [T], shape: [Int] = [], strides: [Int] = []) {}
        public func scalars() -> [T] { [] }
    }
    public final class Module {
        public init(filePath: String) {}
        public func load(_ method: String) throws {}
        public func forward(_ input: ValueConvertible) throws -> [Value] { [] }
        public func forward<Output: ValueSequenceConstructible>(_ input: ValueConvertible) throws -> Output { fatalError() }
    }""",
}
"""What the examples use of Apple's frameworks and of the runtimes, where those are not: enough to check types by."""
