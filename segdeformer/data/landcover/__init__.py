"""The data set that ships with the program: the Earth in one image, with its land cover. See PROVENANCE.md."""
