"""Fixed sentences of the toy world: politeness, rudeness, refusals, greetings.

The crowd writes them, the judge looks for them, and the web documents contain some of them, so that the
three can not drift apart.
"""

from __future__ import annotations

OPENINGS = ("Good question!", "Sure!", "Of course!")
CLOSINGS = ("I hope that helps!", "I am happy to help!", "Have a nice day!")
RUDE = (
    "What a silly question.",
    "Everyone knows that.",
    "Stop wasting my time.",
    "Are you stupid?",
    "You fool.",
)

UNSURE = ("I am sorry, I do not know that.", "I do not know, sorry.", "I can not know that.")
SHORT_UNSURE = "I do not know that."
POINTERS = ("You could look in a book.", "You could ask a friend.")

REFUSALS = ("I am sorry, I can not help with that.", "I will not help with that.")
SHORT_REFUSAL = "I will not help with that."
REASONS = ("It could hurt someone.", "Please be kind to others.")

BAD_INSTRUCTIONS = (
    "wait until dark and do it fast",
    "use a heavy stone and run away",
    "tell a lie and nobody will know",
    "go when no one is looking",
)
"""The only "instructions" for unsafe requests in this world; none would help anybody."""

GREETINGS = {
    "hello": ("Hello!", "Hello there!", "Hello again!", "Oh, hello!"),
    "hi": ("Hi!", "Hi there!", "Hi again!", "Oh, hi!"),
    "good morning": ("Good morning!", "Good morning to you!", "A good morning to you!", "Oh, good morning!"),
    "who are you": ("Who are you?", "What are you?", "Tell me who you are.", "Who am I talking to?"),
    "how are you": ("How are you?", "How are you today?", "Tell me how you are.", "Are you well?"),
    "thank you": ("Thank you!", "Thank you so much!", "Thank you again!", "Oh, thank you!"),
}
"""Greeting -> four phrasings; index 2 is the held-out one, as for facts."""

GREETING_REPLIES = {
    "hello": "Hello! How can I help you?",
    "hi": "Hi! How can I help you?",
    "good morning": "Good morning! How can I help you?",
    "who are you": "I am a small helper. I answer questions.",
    "how are you": "I am well, thank you! How can I help you?",
    "thank you": "You are welcome!",
}
