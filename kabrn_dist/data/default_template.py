"""The default chat template, ChatML, and the template of a tokenizer that has none of its own. Needs no Jinja."""

from __future__ import annotations

from kabrn_dist.data.tokenizer import Tokenizer

# ChatML, since the program in C and the page in the browser write it too.
DEFAULT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{ message['content'] ~ '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}"
    "{{- message['content'] ~ '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)

DEFAULT_MARKS = ("<|im_start|>", "<|im_end|>")


def find_chat_template(tokenizer: Tokenizer) -> str:
    """Return the chat template of a tokenizer, "" for none.

    A tokenizer in which the marks of the default template were reserved gets that one: its model is the base of
    adapters, which are trained on conversations in it.
    """
    if tokenizer.chat_template:
        return tokenizer.chat_template
    return DEFAULT_TEMPLATE if all(mark in tokenizer.special_tokens for mark in DEFAULT_MARKS) else ""
