"""Published checkpoints: weights of every layout, tokenizers, chat templates, conversations and
adapters to fine-tune with."""
