"""Published checkpoints: weights of every layout, tokenizers, chat templates, training
conversations, adapters and fine-tuning."""
