"""The web page: what answers (models, worker, conversation) and what is seen (page)."""
