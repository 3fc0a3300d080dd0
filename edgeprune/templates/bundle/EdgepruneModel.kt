package edgeprune

import android.content.res.AssetManager
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.math.roundToInt
import org.json.JSONObject

/** The bundle's model, read from the app's assets. Not for several threads at once. */
class EdgepruneModel(private val assets: AssetManager, private val folder: String = "edgeprune") : AutoCloseable {
    val manifest = JSONObject(read("manifest.json").decodeToString())
    val labels: List<String> =
        if (manifest.isNull("labels")) emptyList()
        else read(manifest.getString("labels")).decodeToString().trimEnd().lines()
    private val inputs = objects(manifest, "inputs")
    private val outputs = objects(manifest, "outputs")
    private val example = manifest.getJSONObject("example")
    private val runtime = Runtime(
        direct(read(manifest.getString("model"))),
        manifest.getJSONObject("measured").getJSONObject("conditions").getInt("threads"),
        objects(example, "inputs").map(::tensor),
        objects(example, "outputs").map(::tensor),
    )

    /** The best class and its score. raw: values of the first input as the camera has them, in the manifest's layout. */
    fun classify(raw: FloatArray): Pair<String, Float> {
        val scores = values(runtime.run(listOf(prepare(raw)))[0], outputs[0])
        val best = scores.indices.maxByOrNull { scores[it] } ?: 0
        return Pair(labels.getOrElse(best) { best.toString() }, scores[best])
    }

    /** Normalised, then quantised where the model wants numbers of 8 bits. */
    fun prepare(raw: FloatArray): ByteBuffer {
        val input = inputs[0]
        val shape = tensor(objects(example, "inputs")[0]).shape
        val axis = input.getString("layout").indexOf('C')
        val after = shape.drop(axis + 1).fold(1L) { product, size -> product * size }
        val steps = input.optJSONObject("normalisation") ?: JSONObject()
        val scale = steps.optDouble("scale", 1.0)
        fun step(key: String, place: Int, otherwise: Double): Double {
            val given = steps.optJSONArray(key) ?: return otherwise
            val channel = (place / after % shape[axis]).toInt()
            return given.getDouble(if (given.length() == 1) 0 else channel)
        }
        val bytes = buffer(raw.size * size(input.getString("dtype")))
        for (place in raw.indices) {
            val value = (raw[place] * scale - step("mean", place, 0.0)) / step("std", place, 1.0)
            put(bytes, value, input)
        }
        bytes.rewind()
        return bytes
    }

    /** Whether this device gives the recorded outputs for the recorded inputs. */
    fun matchesRecorded(): Boolean {
        val got = runtime.run(objects(example, "inputs").map { direct(read(it.getString("file"))) })
        return objects(example, "outputs").withIndex().all { (place, entry) ->
            val stored = JSONObject().put("dtype", entry.getString("dtype"))
            val mine = values(got[place], stored)
            val theirs = values(direct(read(entry.getString("file"))), stored)
            val largest = theirs.maxOf { abs(it) }.coerceAtLeast(1e-12f)
            mine.indices.all { abs(mine[it] - theirs[it]) / largest <= example.getDouble("tolerance") }
        }
    }

    override fun close() = runtime.close()

    private fun put(bytes: ByteBuffer, value: Double, info: JSONObject) {
        val stored = if (info.isNull("scale")) value else value / info.getDouble("scale") + info.getInt("zero_point")
        when (info.getString("dtype")) {
            "float32" -> bytes.putFloat(stored.toFloat())
            "int8" -> bytes.put(stored.roundToInt().coerceIn(-128, 127).toByte())
            "uint8" -> bytes.put(stored.roundToInt().coerceIn(0, 255).toByte())
            "int32" -> bytes.putInt(stored.roundToInt())
            else -> error("this snippet does not write ${info.getString("dtype")}")
        }
    }

    private fun values(bytes: ByteBuffer, info: JSONObject): FloatArray {
        bytes.order(ByteOrder.nativeOrder()).rewind()
        val dtype = info.getString("dtype")
        val stored = FloatArray(bytes.remaining() / size(dtype)) {
            when (dtype) {
                "float32" -> bytes.getFloat()
                "int8" -> bytes.get().toFloat()
                "uint8" -> (bytes.get().toInt() and 255).toFloat()
                "int32" -> bytes.getInt().toFloat()
                else -> error("this snippet does not read $dtype")
            }
        }
        if (info.isNull("scale")) return stored
        val scale = info.getDouble("scale").toFloat()
        val zeroPoint = info.getInt("zero_point")
        return FloatArray(stored.size) { (stored[it] - zeroPoint) * scale }
    }

    private fun size(dtype: String) = if (dtype.endsWith("32")) 4 else 1

    private fun buffer(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

    private fun direct(bytes: ByteArray): ByteBuffer = buffer(bytes.size).apply { put(bytes); rewind() }

    private fun read(name: String): ByteArray = assets.open("$folder/$name").use { it.readBytes() }

    private fun objects(parent: JSONObject, key: String): List<JSONObject> {
        val array = parent.getJSONArray(key)
        return List(array.length()) { array.getJSONObject(it) }
    }

    private fun tensor(entry: JSONObject): Tensor {
        val shape = entry.getJSONArray("shape")
        val sizes = LongArray(shape.length()) { shape.getLong(it) }
        val bytes = sizes.fold(1L) { product, each -> product * each } * size(entry.getString("dtype"))
        return Tensor(entry.getString("name"), entry.getString("dtype"), sizes, bytes.toInt())
    }
}

/** One input or output of the model. */
class Tensor(val name: String, val dtype: String, val shape: LongArray, val bytes: Int)
