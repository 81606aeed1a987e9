"""Tiny tokenizers and chat templates, made in memory: the shapes that break encoders, each in its smallest form.

The templates are short wordings of formats that are in use; they are not the published texts.
"""

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her friends.",
    "Human: What is the best way to cook rice?\n\nAssistant: Rinse it, add water, and simmer it for 15 minutes.",
    "I can't do that, and you shouldn't either: it's 1, 2, 30 or 45678 (perhaps).\n\n\nBut they're   going anyway!",
    "def add(a, b):\n    return a + b\n\tprint('the sum is', a + b)\n",
    "naïve café, Ångström; über-cool — “quoted” … 東京は日本の首都です。 你好，世界！ Привет, мир! 👩‍👩‍👧 🙂",
    "system user assistant model helpful answer question yes no think thinking because therefore hello there",
] * 4

# What is written between an assistant's content and the next turn, and what control tokens a family has.
CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
    "zephyr": ["<|user|>", "<|assistant|>", "<|system|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "granite": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
    "command": ["<BOS>", "<|START_OF_TURN|>", "<|END_OF_TURN|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>"],
}

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # A system message of its own where the conversation has none.
    "chatml-default-system": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # No generation prompt; the end token ends a turn; blanks around the contents.
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    # The system message moves into the last user message, so that earlier renderings are no beginnings of later ones.
    "mistral-last-system": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
        "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (ns.system if m == last else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}"
        "{% set ns.system = '' %}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Writes the end token behind the whole, after the end of turn.
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    # Thinking is dropped from turns before the last user message, and an empty thought stands in the last reply.
    "qwen3": (
        "{% set ns = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.query and (loop.last or thought) %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' %}{% set content = m.content %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    # The generation prompt opens a thought that no stored reply begins with (DeepSeek-R1, QwQ).
    "deepseek-opens-thought": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
    # Plain words, nothing that ends a turn.
    "plain-words": (
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}"
        "{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "granite": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}"
        "{{ m.content + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "command": (
        "{{ bos_token }}{% for m in messages %}{% set who = {'user': '<|USER|>', 'assistant': '<|CHATBOT|>', "
        "'system': '<|SYSTEM|>'}[m.role] %}{{ '<|START_OF_TURN|>' + who + m.content.strip() + '<|END_OF_TURN|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|CHATBOT|>' }}{% endif %}"
    ),
}

FAMILY = {
    "chatml-default-system": "chatml",
    "qwen3": "chatml",
    "deepseek-opens-thought": "deepseek",
}


def _finish(core: Tokenizer, bos, eos, pad, control, words, add_bos, add_eos, template) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in words])
    before = f"{bos} " if add_bos and bos else ""
    after = f" {eos}" if add_eos and eos else ""
    if before or after:
        named = [(text, core.token_to_id(text)) for text in {bos, eos} if text]
        core.post_processor = processors.TemplateProcessing(single=f"{before}$A{after}", special_tokens=named)
    unknown = "<unk>" if core.token_to_id("<unk>") is not None else None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown
    )
    tokenizer.chat_template = template
    return tokenizer


def _specials(bos, eos, pad, control) -> list[str]:
    return list(dict.fromkeys(text for text in (bos, eos, pad, *control) if text))


@cache
def _trained(kind: str, specials: tuple[str, ...], size: int) -> str:
    """JSON of a tokenizer of that kind, its special tokens first."""
    if kind in ("bytes", "bytes-space", "bytes-llama3"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes-space")
        if kind == "bytes-llama3":
            words = (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            core.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(words), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind.startswith("metaspace"):  # metaspace-always, -first, -never; characters beyond the corpus are bytes
        scheme = kind.partition("-")[2]
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        core.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        )
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=[*specials, "<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        raise ValueError(kind)
    core.train_from_iterator(CORPUS, trainer)
    spec = json.loads(core.to_str())  # bytes are pieces, no added tokens
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(spec)


KINDS = ("bytes", "bytes-space", "bytes-llama3", "metaspace-always", "metaspace-first", "metaspace-never", "unigram")


def tokenizer(
    kind: str = "bytes",
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = None,
    control: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    add_bos: bool = False,
    add_eos: bool = False,
    template: str | None = None,
    size: int = 700,
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on CORPUS. The first special token has id 0 (in metaspace kinds <unk> has).

    words: added tokens that are not special. add_bos, add_eos: written by the tokenizer itself.
    """
    core = Tokenizer.from_str(_trained(kind, tuple(_specials(bos, eos, pad, control)), size))
    return _finish(core, bos, eos, pad, control, words, add_bos, add_eos, template)


def chat_tokenizer(name: str, kind: str = "bytes-llama3", **options) -> PreTrainedTokenizerFast:
    """A tokenizer with the template of that name and the control tokens it needs."""
    family = FAMILY.get(name, name)
    control = tuple(CONTROL.get(family, ()))
    ends = {
        "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
        "gemma": ("<bos>", "<eos>"),
        "phi3": (None, "<|endoftext|>"),
        "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        "granite": (None, "<|end_of_text|>"),
        "command": ("<BOS>", "<|END_OF_TURN|>"),
        "chatml": (None, "<|im_end|>"),
    }
    bos, eos = ends.get(family, ("<s>", "</s>"))
    words = ("<think>", "</think>") if name in ("qwen3", "deepseek", "deepseek-opens-thought") else ()
    options = {"bos": bos, "eos": eos, "words": words, "control": control, "template": TEMPLATES[name], **options}
    return tokenizer(kind, **options)


def llama_like(**options) -> PreTrainedTokenizerFast:
    """As sentencepiece models were converted: the normalizer writes the dummy space, nothing splits words."""
    made = tokenizer("metaspace-first", add_bos=True, **options)
    core = made.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    return made
