package edgeprune

import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.tensorflow.lite.Interpreter

/** How this bundle's model runs: LiteRT's interpreter for Android. */
class Runtime(model: ByteBuffer, threads: Int, inputs: List<Tensor>, private val outputs: List<Tensor>) :
    AutoCloseable {
    private val interpreter = Interpreter(model, Interpreter.Options().setNumThreads(threads))

    init {
        check(interpreter.getInputTensorCount() == inputs.size) { "the model does not have the inputs of manifest.json" }
    }

    fun run(given: List<ByteBuffer>): List<ByteBuffer> {
        val results = outputs.map { ByteBuffer.allocateDirect(it.bytes).order(ByteOrder.nativeOrder()) }
        val places: Map<Int, Any> = results.withIndex().associate { (place, bytes) -> place to bytes }
        interpreter.runForMultipleInputsOutputs(given.toTypedArray<Any>(), places)
        return results
    }

    override fun close() = interpreter.close()
}
