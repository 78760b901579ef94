"""A vision-language model as a judge: it is shown images and asked for scores, which are marked as a judge's."""
