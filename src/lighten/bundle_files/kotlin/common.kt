// --- begin pure: needs nothing of Android ---

/** What manifest.json says about the model, and the arithmetic before and after it. */
object Model {
    const val FILE = @FILE@
    const val INPUT = @INPUT@
    const val OUTPUT = @OUTPUT@
    const val HEIGHT = @HEIGHT@
    const val WIDTH = @WIDTH@
    const val CHANNELS = @CHANNELS@
    const val CHANNEL_ORDER = "@ORDER@"
    const val LAYOUT = "@LAYOUT@"
    const val MODE = "@MODE@"
    const val INTERPOLATION = "@INTERPOLATION@"
//: if crop
    const val RESIZE = @RESIZE@
//: end
//: if float
    val MEAN = doubleArrayOf(@MEAN@)
    val STD = doubleArrayOf(@STD@)
    private val mean = FloatArray(CHANNELS) { MEAN[it].toFloat() }
    private val std = FloatArray(CHANNELS) { STD[it].toFloat() }
//: end

    /** Class names in the order of the scores, English and Chinese. */
    val LABELS: List<String> by lazy {
        listOf(
@LABELS@
        )
    }
    val LABELS_ZH: List<String> by lazy {
        listOf(
@LABELS_ZH@
        )
    }

    /** Width and height to scale an image of this size to, before the centre is cut out. */
    fun scaledSize(width: Int, height: Int): IntArray =
//: if stretch
        intArrayOf(WIDTH, HEIGHT)
//: end
//: if crop
        if (width <= height) intArrayOf(RESIZE, (RESIZE.toLong() * height / width).toInt())
        else intArrayOf((RESIZE.toLong() * width / height).toInt(), RESIZE)
//: end

    /** Left and top of the centre cut out of a scaled image of this size; halves go to the even number. */
    fun cropCorner(width: Int, height: Int): IntArray =
        intArrayOf(Math.rint((width - WIDTH) / 2.0).toInt(), Math.rint((height - HEIGHT) / 2.0).toInt())

    /** Channel [c] of a pixel 0xAARRGGBB, 0 to 255, in the order that the model takes. */
    private fun channel(argb: Int, c: Int): Int =
//: if RGB
        (argb shr (16 - 8 * c)) and 0xff
//: end
//: if BGR
        (argb shr (8 * c)) and 0xff
//: end
//: if GRAY
        (((argb shr 16) and 0xff) * 19595 + ((argb shr 8) and 0xff) * 38470 + (argb and 0xff) * 7471 + 32768) shr (16 + c)
//: end
//: if float

    /** [HEIGHT] x [WIDTH] pixels 0xAARRGGBB, row by row, to the model's input: (pixel / 255 - mean) / std, [LAYOUT]. */
    fun normalize(argb: IntArray): FloatArray {
        require(argb.size == HEIGHT * WIDTH) { "wanted ${HEIGHT * WIDTH} pixels, got ${argb.size}" }
        val out = FloatArray(CHANNELS * HEIGHT * WIDTH)
        for (i in argb.indices) for (c in 0 until CHANNELS) {
            out[@PLACE@] = (channel(argb[i], c) / 255f - mean[c]) / std[c]
        }
        return out
    }
//: end
//: if uint8

    /** [HEIGHT] x [WIDTH] pixels 0xAARRGGBB, row by row, to the model's input: bytes, [LAYOUT]; the file normalises them. */
    fun bytes(argb: IntArray): ByteArray {
        require(argb.size == HEIGHT * WIDTH) { "wanted ${HEIGHT * WIDTH} pixels, got ${argb.size}" }
        return ByteArray(CHANNELS * HEIGHT * WIDTH) { channel(argb[it / CHANNELS], it % CHANNELS).toByte() }
    }
//: end

    /** Scores to probabilities that add up to 1. */
    fun softmax(scores: FloatArray): FloatArray {
        val largest = scores.fold(Float.NEGATIVE_INFINITY) { a, b -> maxOf(a, b) }
        val powers = DoubleArray(scores.size) { Math.exp((scores[it] - largest).toDouble()) }
        val sum = powers.sum()
        return FloatArray(scores.size) { (powers[it] / sum).toFloat() }
    }

    /** Places of the [k] largest values, largest first; of equal ones the first. */
    fun topK(values: FloatArray, k: Int): List<Int> = values.indices.sortedByDescending { values[it] }.take(k)
}

/** One class and how sure the model is of it, 0 to 1. */
data class Answer(val label: String, val labelZh: String, val probability: Float)

/** The [k] likeliest classes, likeliest first. */
fun answers(scores: FloatArray, k: Int): List<Answer> {
    val probabilities = Model.softmax(scores)
    return Model.topK(probabilities, k).map { Answer(Model.LABELS[it], Model.LABELS_ZH[it], probabilities[it]) }
}

// --- end pure ---

/**
 * A bitmap (upright, not of the kind HARDWARE) scaled and cut as the model wants it: pixels 0xAARRGGBB, row by row.
 *
 * Android's filter is not Pillow's, bit for bit: a few answers may differ from those measured. golden.npz is the judge of
 * everything after this function: its `pixels` through [Classifier.scores] must give its `outputs`, within its `atol`.
 */
fun pixelsOf(bitmap: Bitmap): IntArray {
    val (width, height) = Model.scaledSize(bitmap.width, bitmap.height)
    val (left, top) = Model.cropCorner(width, height)
    val smooth = Model.INTERPOLATION != "nearest"
    var image = bitmap
    // Android's filter reads four pixels only: large steps are taken by halves, so that every pixel counts, as in Pillow.
    while (smooth && image.width >= 2 * width && image.height >= 2 * height) {
        image = Bitmap.createScaledBitmap(image, image.width / 2, image.height / 2, true)
    }
    image = Bitmap.createScaledBitmap(image, width, height, smooth)
    val argb = IntArray(Model.WIDTH * Model.HEIGHT)
    image.getPixels(argb, 0, Model.WIDTH, left, top, Model.WIDTH, Model.HEIGHT)
    return argb
}
