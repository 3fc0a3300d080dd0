package edgeprune

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer

/** How this bundle's model runs: ONNX Runtime for Android. */
class Runtime(model: ByteBuffer, threads: Int, private val inputs: List<Tensor>, private val outputs: List<Tensor>) :
    AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        environment.createSession(ByteArray(model.remaining()).also { model.get(it) }, options)
    }

    fun run(given: List<ByteBuffer>): List<ByteBuffer> {
        val tensors = inputs.zip(given) { tensor, bytes ->
            tensor.name to OnnxTensor.createTensor(environment, bytes, tensor.shape, type(tensor))
        }
        try {
            return session.run(tensors.toMap()).use { results ->
                outputs.map { (results.get(it.name).get() as OnnxTensor).getByteBuffer() }
            }
        } finally {
            tensors.forEach { it.second.close() }
        }
    }

    override fun close() = session.close()

    private fun type(tensor: Tensor): OnnxJavaType = when (tensor.dtype) {
        "float32" -> OnnxJavaType.FLOAT
        "int8" -> OnnxJavaType.INT8
        "uint8" -> OnnxJavaType.UINT8
        "int32" -> OnnxJavaType.INT32
        else -> error("this snippet does not know ${tensor.dtype}")
    }
}
