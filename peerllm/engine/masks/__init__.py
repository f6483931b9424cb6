"""Which tokens an answer may go on with, so that its text is what was asked for: computed beside the passes."""
