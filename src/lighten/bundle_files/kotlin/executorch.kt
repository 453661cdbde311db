// Classifies images with this bundle's ExecuTorch file on Android. Paste it into the app, with the file in assets/, and
// implementation("org.pytorch:executorch-android:VERSION"), VERSION as in manifest.json (runtime) or newer.
//
//   Classifier(context).use { classifier -> classifier.classify(bitmap, 3).forEach { println(it) } }

import android.content.Context
import android.graphics.Bitmap
import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

@COMMON@

/** Loads the model once, for one image at a time; not for the main thread. */
class Classifier(context: Context) : AutoCloseable {
    private val module = Module.load(copied(context).absolutePath)

    fun classify(bitmap: Bitmap, k: Int = 3): List<Answer> = answers(scores(pixelsOf(bitmap)), k)

    /** Scores before softmax, one a class. */
    fun scores(argb: IntArray): FloatArray {
        val shape = longArrayOf(1, Model.CHANNELS.toLong(), Model.HEIGHT.toLong(), Model.WIDTH.toLong())
        val input = Tensor.fromBlob(Model.normalize(argb), shape)
        return module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
    }

    override fun close() = module.destroy()

    /** ExecuTorch reads files, not assets. */
    private fun copied(context: Context): File {
        val file = File(context.filesDir, Model.FILE)
        context.assets.open(Model.FILE).use { from -> file.outputStream().use { from.copyTo(it) } }
        return file
    }
}
