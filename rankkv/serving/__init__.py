"""The server `rankkv serve`: in, requests of the OpenAI API; out, answers from stored compressed contexts.

Everything that speaks HTTP to a model is transformers' own serving code: handlers, templates, tools, streaming.  This
package adds the stored contexts, and closes what a public server must not offer.  Nothing is imported here, so that
``rankkv serve --help`` answers at once.
"""
