"""Networks trained with a choice of normalization layer: one trainer for the demonstration, for the
paper's experiments and for the study of the digits. Needs the extra ``accuracy``."""
