# SPDX-License-Identifier: Apache-2.0
"""KTransformers' class, operator and keyword names, as data. Never imported: matched by their last
component.
"""

# wrappers of the routed experts: these are ours to place and run
EXPERTS_CLASSES = frozenset({
    "KTransformersExperts", "KTransformersExpertsV2", "KTransformersExpertsW8A8", "KGlm4Experts",
    "KLlama4Experts", "KSmallthinkerExperts", "KExpertsCPU", "KExpertsCPUW8A8", "KExpertsMarlin",
    "KExpertsTorch", "KSFTExpertsCPU", "KSFTRouteExpertsCPU", "MLPCUDAExperts", "MLPCPUExperts",
})  # fmt: skip

# experts operators -> ours: "cpu" and "cuda" are our kernels, "torch" is plain PyTorch
EXPERTS_OPS = {
    "KExpertsCPU": "cpu",
    "KExpertsCPUW8A8": "cpu",
    "KSFTExpertsCPU": "cpu",
    "KSFTRouteExpertsCPU": "cpu",
    "MLPCPUExperts": "cpu",
    "KExpertsMarlin": "cuda",
    "MLPCUDAExperts": "cuda",
    "KExpertsTorch": "torch",
    "cpu": "cpu",
    "cuda": "cuda",
    "torch": "torch",
}

LINEAR_OPS = frozenset({
    "KLinearMarlin", "KLinearTorch", "VLinearMarlin", "KLinearFP8", "KLinearIPEXLLM",
    "KLinearTorchW8A8A2", "KLinearCPUInfer", "KLinearQ8", "QuantizedLinearTorch",
    "QuantizedLinearMarlin", "QuantizedLinearCPUInfer",
})  # fmt: skip

# everything that is not routed experts: honoured for its devices, carried as not ours
FOREIGN_CLASSES = frozenset({
    # MoE blocks
    "KDeepseekV3MoE", "KDeepseekV2MoE", "KDeepseekV3MoEV2", "KDeepseekV3MoEW8A8",
    "KQwen2MoeSparseMoeBlock", "KQwen2MoeSparseMoeBlockV2", "KQwen3MoeSparseMoeBlock",
    "KQwen3MoeSparseMoeBlockV2", "KQwen3MoeSparseMoeBlockW8A8", "KQwen3NextSparseMoeBlockV2",
    "KMistralSparseMoEBlock", "KGlm4MoeMoE", "KSmallthinkerMoeBlock", "KLlama4Moe", "KHunyuanMoE",
    # linear
    "KTransformersLinear", "KTransformersLinearW8A8A2",
    # attention
    "KDeepseekV2Attention", "KLlamaAttention", "KQwen3MoeAttentionIPEXLLM", "KQwen3MoeAttention",
    "KQwen2MoeAttention", "KGlm4MoeAttention", "KQwen3NextAttention", "KQwen3NextGatedDeltaNet",
    "KSmallthinkerAttention", "flashinfer_attn", "KDeepseekV2AttentionW8A8A2",
    "KDeepseekV2AttentionW8A8A2Serve", "KQwen3MoeAttentionW8A8A2Serve", "KLlama4Attention",
    "KHunYuanAttention",
    # models
    "KDeepseekV2Model", "KQwen2MoeModel", "KLlamaModel", "KQwen3MoeModel", "KLlama4Model",
    "KHunyuanModel",
    # rotary embeddings
    "YarnRotaryEmbeddingV3", "YarnRotaryEmbedding", "RotaryEmbedding", "RotaryEmbeddingV2",
    "RotaryEmbeddingV3", "RotaryEmbeddingV4", "KQwen3MoeRotaryEmbedding",
    "KGlm4MoeRotaryEmbedding", "KSmallthinkerRotaryEmbedding", "YarnRotaryEmbeddingV2",
    "KLlama4RotaryEmbedding", "KHunYuanRotaryEmbedding",
    # gates
    "KMoEGate", "KMoEGateGreedy", "KMoEGateIPEXLLM", "KDeepseekV3GateA2", "KMoEGateQwen2Moe",
    "KMoEGateDeepSeekV3",
    # MLPs
    "KQwen2MoeMLP", "kDeepseekV3MLP", "KGlm4MoeMLP", "KSmallthinkerDenseMlpBlock",
    "KDeepseekV3MLPW8A8A2V1", "KDeepseekV3MLPW8A8A2V2", "KLlama4MLP", "KHunYuanMLP",
    # norms
    "RMSNorm", "KDeepseekRMSNormIPEXLLM", "KQwen2MoeRMSNorm", "KQwen3MoeRMSNorm",
    "KGlm4MoeRMSNorm", "KQwen3NextRMSNorm", "KSmallthinkerRMSNorm", "KDeepseekV3RMSNormW8A8",
    "KQwen3MoeRMSNormW8A8", "KLlama4RMSNorm", "KHunYuanRMSNorm",
})  # fmt: skip

# classes that rules match although no family of ours has them (other models, other generations)
OTHER_MATCH_CLASSES = frozenset({
    "Module", "Linear", "Embedding", "ModuleList", "LayerNorm", "RMSNorm", "Conv1d",
    "LlamaRotaryEmbedding", "LlamaModel", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm",
    "LlamaDecoderLayer", "MoEGate",
    "Qwen3NextRotaryEmbedding", "Qwen3NextSparseMoeBlock", "Qwen3NextGatedDeltaNet",
    "Qwen3NextAttention", "Qwen3NextRMSNorm", "Qwen3NextMLP", "SmallthinkerRotaryEmbedding",
    "SmallthinkerMoeBlock", "SmallthinkerRMSNorm", "SmallthinkerDenseMlpBlock",
    "DeepseekV2YarnRotaryEmbedding", "DeepseekV3YarnRotaryEmbedding",
    "DeepseekV2LinearScalingRotaryEmbedding", "DeepseekV2DynamicNTKScalingRotaryEmbedding",
    "HunYuanDynamicNTKAlphaRotaryEmbedding", "HunYuanMoE", "HunYuanMLP", "HunYuanRMSNorm",
    "HunYuanAttention",
})  # fmt: skip

TOP_KEYS = ("match", "replace", "recursive")
MATCH_KEYS = ("name", "class")
REPLACE_KEYS = ("class", "kwargs")
KWARGS = (
    "generate_device", "prefill_device", "generate_op", "prefill_op", "out_device", "transfer_map",
    "per_layer_prefill_intput_threshold", "per_layer_prefill_input_threshold",
    "absorb_for_prefill", "backend", "n_deferred_experts", "num_bits", "device", "dump_enable",
    "dump_dir", "chunck_size", "chunk_size", "use_softmax",
    "format",  # ours: the weight format of these experts
)  # fmt: skip
DEVICE_KWARGS = ("generate_device", "prefill_device", "out_device", "device")
