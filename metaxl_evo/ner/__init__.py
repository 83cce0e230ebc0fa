"""Cross-lingual named entity recognition: data, entity scores and a synthetic language family."""
