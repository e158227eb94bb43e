"""Records of runs, as tables, sentences, pictures and progress; it knows no training code."""
