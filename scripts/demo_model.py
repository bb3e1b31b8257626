"""The demo's byte-level tokenizer and tiny Llama, and how the four LoRA experts are shaped."""

from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte value in the byte-level convention of GPT-2: itself, or 256 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(value if value in printable else next(stand_ins)) for value in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value, then bos, eos, pad; bos is put in front of every text; round trips all of UTF-8."""
    vocab = {symbol: value for value, symbol in enumerate(_byte_symbols())}
    vocab |= {BOS: BOS_ID, EOS: EOS_ID, PAD: PAD_ID}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(*, hidden_size: int = 128, intermediate_size: int = 256, num_hidden_layers: int = 4) -> LlamaForCausalLM:
    """About 0.6 M parameters unless made smaller; grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def expert_configs() -> dict[str, LoraConfig]:
    """One LoRA a task, different on purpose: targets, ranks, rsLoRA, rank and alpha patterns."""
    shared = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    return {
        "add": LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=ATTENTION + MLP, **shared),
        "reverse": LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **shared),
        "sort": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, **shared),
        "cipher": LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=MLP,
            rank_pattern={"down_proj": 12, "layers.0.mlp.up_proj": 4},
            alpha_pattern={"down_proj": 36},
            **shared,
        ),
    }
