// Classifies images with this bundle's ONNX file on Android. Paste it into the app, with the file in assets/, and
// implementation("com.microsoft.onnxruntime:onnxruntime-android:VERSION"), VERSION as in manifest.json (runtime) or newer.
//
//   Classifier(context).use { classifier -> classifier.classify(bitmap, 3).forEach { println(it) } }

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context
import android.graphics.Bitmap
//: if float
import java.nio.FloatBuffer
//: end
//: if uint8
import ai.onnxruntime.OnnxJavaType
import java.nio.ByteBuffer
//: end

@COMMON@

/** Loads the model once; not for the main thread. */
class Classifier(context: Context, threads: Int = 1) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        environment.createSession(context.assets.open(Model.FILE).use { it.readBytes() }, options)
    }

    fun classify(bitmap: Bitmap, k: Int = 3): List<Answer> = answers(scores(pixelsOf(bitmap)), k)

    /** Scores before softmax, one a class. */
    fun scores(argb: IntArray): FloatArray = input(argb).use { input ->
        session.run(mapOf(Model.INPUT to input), setOf(Model.OUTPUT)).use { answer ->
            val scores = (answer.get(0) as OnnxTensor).floatBuffer
            FloatArray(scores.remaining()).also { scores.get(it) }
        }
    }

//: if float
    private fun input(argb: IntArray): OnnxTensor = OnnxTensor.createTensor(
        environment,
        FloatBuffer.wrap(Model.normalize(argb)),
        longArrayOf(1, Model.CHANNELS.toLong(), Model.HEIGHT.toLong(), Model.WIDTH.toLong())
    )
//: end
//: if uint8
    private fun input(argb: IntArray): OnnxTensor = OnnxTensor.createTensor(
        environment,
        ByteBuffer.wrap(Model.bytes(argb)),
        longArrayOf(1, Model.HEIGHT.toLong(), Model.WIDTH.toLong(), Model.CHANNELS.toLong()),
        OnnxJavaType.UINT8
    )
//: end

    override fun close() = session.close()
}
