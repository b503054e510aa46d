"""Conversations: read, written out by a chat template, told apart by speaker, packed whole."""
