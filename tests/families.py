"""Seven families of chat templates on small real tokenizers, and a reading of their text that does not use graftlab.

Templates are written after the form that each family has published; vocabularies are trained on a few sentences."""
import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["What colour is the shape in this picture?", "THE SHAPE IS A RED CIRCLE.", "user assistant model system You are a helpful assistant.",
        "how many dogs are there on the grass", "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,?!<>[]/|\n"]*3

LLAMA3 = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set own = messages[0]['content'] | trim %}{%- set rest = messages[1:] %}
{%- else %}{%- set own = '' %}{%- set rest = messages %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + own + '<|eot_id|>' }}
{%- for m in rest %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
CHATML = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = """{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{- '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n' }}
{%- elif m['role'] == 'assistant' %}{%- set said = m['content'].split('</think>')[-1].lstrip('\\n') %}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.index0 > ns.last else '') + said + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
GEMMA = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
MISTRAL = """{{- bos_token }}{%- for m in messages %}
{%- if m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] | trim + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"""
PHI3 = """{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""


@dataclass
class Family:
    template: str
    special: list # turn tokens
    bos: str
    eos: str
    kind: str # 'bytes' (GPT-2's way) or 'meta' (SentencePiece's)
    turn: str # regular expression of one turn: groups `special..` and `answer..`
    strip: bool = False # special tokens swallow the white space behind them
    plain: tuple = () # added tokens that are not special


TURNS = {
    'llama3': r"(?P<s1><\|start_header_id\|>)user(?P<s2><\|end_header_id\|>)\n\n.*?(?P<s3><\|eot_id\|>)(?P<s4><\|start_header_id\|>)assistant(?P<s5><\|end_header_id\|>)\n\n(?P<a>.*?<\|eot_id\|>)",
    'chatml': r"(?P<s1><\|im_start\|>)user\n.*?(?P<s2><\|im_end\|>)\n(?P<s3><\|im_start\|>)assistant\n(?P<a>.*?<\|im_end\|>)",
    'qwen3': r"(?P<s1><\|im_start\|>)user\n.*?(?P<s2><\|im_end\|>)\n(?P<s3><\|im_start\|>)assistant\n(?:<think>\n\n</think>\n\n)?(?P<a>.*?<\|im_end\|>)",
    'gemma': r"(?P<s1><start_of_turn>)user\n.*?(?P<s2><end_of_turn>)\n(?P<s3><start_of_turn>)model\n(?P<a>.*?<end_of_turn>)",
    'mistral': r"(?P<s1>\[INST\]) .*? (?P<s2>\[/INST\])(?P<a> .*?</s>)",
    'phi3': r"(?P<s1><\|user\|>)\n.*?(?P<s2><\|end\|>)\n(?P<s3><\|assistant\|>)\n(?P<a>.*?<\|end\|>)"}
IM = ['<|im_start|>', '<|im_end|>']
FAMILIES = {
    'llama3': Family(LLAMA3, ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'], '<|begin_of_text|>', '<|eot_id|>', 'bytes', TURNS['llama3']),
    'qwen2.5': Family(CHATML.replace('SYSTEM', 'You are a helpful assistant.'), IM, None, '<|im_end|>', 'bytes', TURNS['chatml']),
    'qwen3': Family(QWEN3, IM, None, '<|im_end|>', 'bytes', TURNS['qwen3'], plain=('<think>', '</think>')),
    'gemma': Family(GEMMA, ['<start_of_turn>', '<end_of_turn>'], '<bos>', '<eos>', 'meta', TURNS['gemma']),
    'mistral': Family(MISTRAL, ['[INST]', '[/INST]'], '<s>', '</s>', 'meta', TURNS['mistral']),
    'phi3': Family(PHI3, ['<|user|>', '<|assistant|>', '<|end|>'], '<s>', '<|endoftext|>', 'meta', TURNS['phi3'], strip=True),
    'smollm2': Family(CHATML.replace('SYSTEM', 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'), IM, '<|im_start|>', '<|im_end|>', 'bytes', TURNS['chatml'])}


def make_tokenizer(family: Family, image='<image>'):
    "A small tokenizer with the family's special tokens, way of splitting, and template"
    if family.kind == 'bytes':
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    else:
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
        t.normalizer = normalizers.Replace(' ', '▁')
        t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=['<unk>', *(f'<0x{i:02X}>' for i in range(256))], show_progress=False)
    t.train_from_iterator(TEXT, trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos)
    special = [AddedToken(s, rstrip=family.strip, normalized=False, special=True) for s in family.special] + [AddedToken(image, normalized=False, special=True)]
    tok.add_special_tokens(dict(additional_special_tokens=special), replace_extra_special_tokens=False)
    tok.add_tokens([AddedToken(p, normalized=False, special=False) for p in family.plain])
    tok.chat_template = family.template
    return tok


def spans(family: Family, text: str, special: bool):
    "Supervised spans of the rendered text, by the family's regular expression alone"
    found = []
    for m in re.finditer(family.turn, text, flags=re.S):
        for name in m.groupdict():
            if name == 'a' or special: found.append(m.span(name))
    return sorted(found)


def byte_spans(tok, ids):
    "Where each token lies in the text's bytes, for tokenizers of bytes, by adding up lengths"
    added = {i: t.content for i, t in tok.added_tokens_decoder.items()}
    out, at = [], 0
    for i in ids:
        n = len(added[i].encode()) if i in added else len(tok.convert_ids_to_tokens(i)) # one character stands for one byte
        out.append((at, at + n))
        at += n
    return out
