"""Chat templates of several kinds, a tokenizer of bytes, and chats."""

from __future__ import annotations

from typing import Any

SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>",
    "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip

# [[ and ]] stand where the marked twin has its marks and the template itself has nothing.
LOOP = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
TWINS = {
    "chatml": LOOP + "{{ '<|im_start|>assistant\n' }}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "headers": "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "[[{{ m['content'] | trim + '<|eot_id|>' }}]]{% else %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "bars": LOOP + "{{ '<|assistant|>' }}[[{{ '\n' + m['content'] + eos_token }}]]{{ '\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "turns": "{{ bos_token }}" + LOOP + "{{ '<start_of_turn>model\n' }}[[{{ m['content'] | trim + '<end_of_turn>' }}"
    "]]{{ '\n' }}{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # closes the whole chat with one token more, behind white space
    "closed": LOOP + "{{ '<|assistant|>\n' }}[[{{ m['content'] + '<|end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    # a template that begins with a default system message
    "default": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}  # fmt: skip
PLAIN = {name: text.replace("[[", "").replace("]]", "") for name, text in TWINS.items()}
MARKED = {
    name: text.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}") for name, text in TWINS.items()
}
# The same chats by one expression for all roles, as it stands in the tokenizers of small models.
ONE_EXPRESSION = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Takes the reasoning out of every turn but the last.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NO_TOKENS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

CHATS: dict[str, list[tuple[str, str]]] = {
    "one": [("user", "Hello, world."), ("assistant", "Hello!")],
    "spaces": [("user", " a "), ("assistant", " b \n\n"), ("user", "\nc"), ("assistant", "\n d")],
    "system": [("system", "Be kind."), ("user", "Καλημέρα"), ("assistant", "日本語 é 👍")],
    "empty system": [("system", ""), ("user", "a"), ("assistant", "the end<|")],
    "code": [
        ("user", "def f(x):"), ("assistant", "```py\n    return x\n```"), ("user", "and?"), ("assistant", "4"),
        ("user", "user"), ("assistant", "assistant\nassistant"), ("user", "a"), ("assistant", "a"), ("user", "left"),
    ],
}  # fmt: skip


def chat(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def byte_tokenizer(template: str | None = None, trim: bool = False, corpus: str = "", eos: str | None = "</s>") -> Any:
    """A byte-level tokenizer with some merges; `trim` takes white space out of its offsets, as older ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([corpus or "Hello, world. The assistant said hello to the user."] * 9, trainer)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast
