"""What runs inside each vLLM worker to replace the weights."""

from typing import Any

from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class WeightLoader:
    """Mixed into vLLM's Worker (worker_extension_cls); called through collective_rpc."""

    model_runner: Any

    def load_directory(self, directory: str) -> None:
        self.model_runner.reload_weights(weights_path=directory)
        # On CPU an output layer multiplies with a packed copy of its weights. vLLM's reload
        # renews the copies of the layers it loads; a tied lm_head is not among them, and
        # would go on with the old weights.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
