// Classifies images with this bundle's LiteRT file on Android. Paste it into the app, with the file in assets/, and
// implementation("com.google.ai.edge.litert:litert:VERSION"), VERSION 2.1 or newer.
//
//   Classifier(context).use { classifier -> classifier.classify(bitmap, 3).forEach { println(it) } }

import android.content.Context
import android.graphics.Bitmap
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

@COMMON@

/** Loads the model once, for one image at a time with its channels last; not for the main thread. */
class Classifier(context: Context) : AutoCloseable {
    private val model = CompiledModel.create(context.assets, Model.FILE, CompiledModel.Options(Accelerator.CPU))
    private val inputs = model.createInputBuffers()
    private val outputs = model.createOutputBuffers()

    fun classify(bitmap: Bitmap, k: Int = 3): List<Answer> = answers(scores(pixelsOf(bitmap)), k)

    /** Scores before softmax, one a class. */
    fun scores(argb: IntArray): FloatArray {
        inputs[0].writeFloat(Model.normalize(argb))
        model.run(inputs, outputs)
        return outputs[0].readFloat()
    }

    override fun close() {
        inputs.forEach { it.close() }
        outputs.forEach { it.close() }
        model.close()
    }
}
