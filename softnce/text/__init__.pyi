"""What text offers, for type checkers. Made by tools/stubs.py from the modules; do not edit."""
from . import words as words
from .words import NgramClassifier as NgramClassifier
from .words import Words as Words
from .words import draw_votes as draw_votes
from .words import language_of_words as language_of_words
from .words import ngram_ids as ngram_ids
from .words import word_frequencies as word_frequencies
from . import definitions as definitions
from .definitions import ContextModel as ContextModel
from .definitions import Contexts as Contexts
from .definitions import Corpus as Corpus
from .definitions import PARTS as PARTS
from .definitions import continuation_targets as continuation_targets
from .definitions import corpus_of as corpus_of
from .definitions import read_texts as read_texts
