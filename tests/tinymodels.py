"""Tiny random models and tokenizers, for tests that must be fast and need no download.

A module, not a fixture, so that processes started by a test (gloo ranks, killed runs) can build the very same model:
`from tinymodels import build_tiny_model`. The folder `tests` is on the path by the `pythonpath` setting of pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ROPE_SHAPE: dict[str, Any] = {"num_key_value_heads": 2}

# Name -> transformers' model_type and what differs from the common shape of build_tiny_model().
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_ROPE_SHAPE}),
    "llama_tied": ("llama", {**_ROPE_SHAPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_ROPE_SHAPE, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_ROPE_SHAPE}),
    "qwen3": ("qwen3", {**_ROPE_SHAPE, "head_dim": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_ROPE_SHAPE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma2": (
        "gemma2",
        {
            **_ROPE_SHAPE,
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_ROPE_SHAPE,
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_ROPE_SHAPE}),
    "olmo2": ("olmo2", {**_ROPE_SHAPE}),
    "granite": ("granite", {**_ROPE_SHAPE, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "cohere": ("cohere", {**_ROPE_SHAPE, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": (
        "cohere2",
        {
            **_ROPE_SHAPE,
            "logit_scale": 0.25,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("smollm3", {**_ROPE_SHAPE}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "gpt_oss": (
        "gpt_oss",
        {**_ROPE_SHAPE, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mamba": ("mamba", {"state_size": 4}),
}

_EXPERTS: dict[str, Any] = {**_ROPE_SHAPE, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
    "gpt_oss": ARCHITECTURES["gpt_oss"],
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    "granitemoe": ("granitemoe", {**_EXPERTS, "num_local_experts": 4}),
    "phimoe": ("phimoe", {**_EXPERTS, "num_local_experts": 4}),
    "ernie4_5_moe": ("ernie4_5_moe", {**_ROPE_SHAPE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
}
"""Mixtures of experts whose families compute a router's auxiliary loss."""


def build_tiny_model(
    architecture: str = "llama",
    *,
    vocab_size: int = 128,
    hidden_size: int = 32,
    num_layers: int = 3,
    seed: int = 0,
    initializer_range: float = 0.2,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal language model in fp32 and eval mode, the same for the same arguments.

    Weights are drawn wide (0.2, not 0.02), so that logits differ between tokens by whole nats and a wrong mask, position or
    scale shows in the log-probabilities.

    Args:
        architecture: a key of `ARCHITECTURES` or `MIXTURES`.
        overrides: any field of the architecture's configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra = {**ARCHITECTURES, **MIXTURES}[architecture]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": initializer_range,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **extra,
        **overrides,
    }
    if model_type == "opt":
        fields.update(word_embed_proj_dim=hidden_size, ffn_dim=2 * hidden_size, dropout=0.0)
    if model_type == "gpt2":
        fields.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Named, since transformers 5.17 takes scaled-dot-product attention here, which drops the cap.
        how = {"attn_implementation": "eager"} if "attn_logit_softcapping" in extra else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
        _shake_constant_weights(model)
    return model.eval()


def _shake_constant_weights(model: PreTrainedModel) -> None:
    """Move norms off 1 and biases off 0, where a forgotten one could not be noticed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def build_tiny_tokenizer(*, vocab_size: int = 384, chat_template: str | None = CHATML_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens, trained in a few milliseconds on the text below.

    Ids 0, 1 and 2 are `<|endoftext|>`, `<|im_start|>` (bos) and `<|im_end|>` (eos and pad), as in SmolLM2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
    )


_TRAINING_TEXT = [
    "system\nuser\nassistant\n",
    "What is the weather like today? It is sunny, and the wind is light.",
    "Please tell me how to reset the password. Open the settings, choose the account, then press reset.",
    "The answer is yes. The answer is no. I would rather not say, but thank you for asking.",
    "A short story about the sea: the boat left the harbour and came back before the storm.",
]
