"""From text to batches: corpus, tokenizer, span corruption, packing, and the sampler that yields
them."""
