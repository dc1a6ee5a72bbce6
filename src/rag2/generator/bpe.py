"""texts -> a byte-level BPE tokenizer, trained on the spot for a model made from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rag2.registry import UserError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SMALLEST = 3 + 256  # the special tokens and one token per byte, so that no text is unknown


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE of at most `vocab_size` tokens over all bytes, `<s>` put first as in Llama.

    Every digit is a token of its own (also as in Llama), so that a number has the same tokens at
    the start of a line as after a space, and a small model can copy it.
    The same texts in the same order give the same tokenizer. The retriever's roles reuse the
    generator's tokens (cls = `<s>`, sep = `</s>`, mask = `<pad>`), so that one vocabulary serves
    both halves. Raises UserError if `vocab_size` cannot hold the bytes and the special tokens.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"vocab_size {vocab_size} is too small: a byte-level BPE needs {SMALLEST}")
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        cls_token=BOS,
        sep_token=EOS,
        mask_token=PAD,
        clean_up_tokenization_spaces=False,
    )
