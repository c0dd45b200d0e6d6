"""A made-up task that can be learned, and a tiny BERT for it: which of two sets of words has more words in a text."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOOD = [f"good{i}" for i in range(12)]
BAD = [f"bad{i}" for i in range(12)]
PLAIN = [f"word{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def rows(count: int, seed: int, pair: bool = False) -> list[dict]:
    """`count` rows {sentence, (other,) label}; of a pair the second text has the words that count."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.randrange(2)
        more, fewer = (GOOD, BAD) if label else (BAD, GOOD)
        few = draw.randrange(1, 3)
        words = draw.choices(more, k=few + draw.randrange(1, 4)) + draw.choices(fewer, k=few) + draw.choices(PLAIN, k=6)
        draw.shuffle(words)
        row = {"sentence": " ".join(words), "label": label}
        found.append(row | {"sentence": " ".join(draw.choices(PLAIN, k=4)), "other": row["sentence"]} if pair else row)
    return found


def write_rows(path: Path, content: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def write_bert(folder: Path, seed: int = 0) -> Path:
    """A random BERT of two layers without a head, and its tokenizer: words, [CLS] in front, [SEP] behind every text."""
    vocabulary = [*SPECIAL, *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    transformers.BertTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    return folder
