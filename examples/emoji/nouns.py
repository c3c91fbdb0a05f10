"""English for the captions: articles, plurals, and the names that no rule gets right (reviewed by hand)."""

from __future__ import annotations

import re

# Names that are not what people call the thing, or that need a word to be countable.
CALLED = {
    "sport utility vehicle": "blue car", "oncoming automobile": "red car seen from the front",
    "oncoming police car": "police car seen from the front", "oncoming bus": "bus seen from the front",
    "oncoming taxi": "taxi seen from the front", "articulated lorry": "lorry", "delivery truck": "delivery truck",
    "pizza": "slice of pizza", "bread": "loaf of bread", "bacon": "strip of bacon", "cheese wedge": "wedge of cheese",
    "popcorn": "bucket of popcorn", "butter": "piece of butter", "garlic": "bulb of garlic", "ice": "ice cube",
    "corn": "ear of corn", "broccoli": "head of broccoli", "cooked rice": "bowl of rice",
    "curry rice": "plate of curry",
    "green salad": "bowl of salad", "sushi": "piece of sushi", "fried shrimp": "fried shrimp", "honey pot": "honey pot",
    "ginger root": "root of ginger", "canned food": "can of food", "meat on bone": "piece of meat on a bone",
    "shaved ice": "bowl of shaved ice", "wine glass": "glass of wine", "sake": "bottle of sake", "mate": "cup of mate",
    "bubble tea": "cup of bubble tea", "dango": "skewer of dango", "oden": "skewer of oden",
    "leafy green": "leafy green",
    "soap": "bar of soap", "yarn": "ball of yarn", "thread": "spool of thread", "wood": "log of wood",
    "coral": "piece of coral", "fire": "flame", "droplet": "drop of water", "basketball": "basketball",
    "baseball": "baseball", "american football": "american football", "rugby football": "rugby ball",
    "soccer ball": "soccer ball", "volleyball": "volleyball", "softball": "softball", "tennis": "tennis racket",
    "badminton": "badminton racket", "ping pong": "ping pong paddle", "ice hockey": "ice hockey stick",
    "field hockey": "field hockey stick", "lacrosse": "lacrosse stick", "bowling": "bowling ball with pins",
    "pool 8 ball": "pool ball", "game die": "die", "high voltage": "yellow lightning bolt", "lady beetle": "ladybird",
    "t-shirt": "t-shirt", "mobile phone": "mobile phone", "luggage": "suitcase", "dna": "strand of dna",
    "snowman without snow": "snowman without snow", "baguette bread": "baguette", "eyes": "pair of eyes",
    "hatching chick": "hatching chick", "front-facing baby chick": "chick seen from the front",
    "glasses": "pair of glasses",
    "ear of corn": "ear of corn", "pile of poo": "pile of poo", "T-Rex": "T-Rex", "mount fuji": "Mount Fuji",
    "locomotive": "steam locomotive", "building construction": "building under construction",
    "cooking": "fried egg in a pan",
    "shallow pan of food": "pan of food", "hot beverage": "cup of coffee", "glass of milk": "glass of milk",
    "watermelon": "slice of watermelon", "melon": "melon", "soft ice cream": "soft ice cream cone",
    "ice cream": "bowl of ice cream", "sewing needle": "sewing needle with thread", "socks": "pair of socks",
    "gloves": "pair of gloves", "scissors": "pair of scissors", "jeans": "pair of jeans", "shorts": "pair of shorts",
    "goggles": "pair of goggles", "skis": "ski", "grapes": "bunch of grapes", "cherries": "pair of cherries",
    "french fries": "box of french fries", "pancakes": "stack of pancakes", "books": "stack of books",
    "balloon": "balloon", "flag in hole": "golf flag", "ox": "ox", "whale": "blue whale",
    "spouting whale": "spouting whale",
    "wheel": "wheel", "gear": "gear", "star": "yellow star", "sun": "sun", "tropical fish": "tropical fish",
}  # fmt: skip
# Further whole phrases, each true of that drawing and of no other one.
EXTRA = {
    "pizza": ["a pizza slice", "a piece of pizza with cheese"],
    "enraged face": ["an angry red face", "a furious red face"],
    "angry face": ["an angry yellow face"], "angry face with horns": ["an angry purple devil"],
    "smiling face with horns": ["a smiling purple devil"], "dog face": ["a smiling dog", "a happy dog's head"],
    "sport utility vehicle": ["a blue automobile"], "oncoming automobile": ["a red automobile"],
    "hot dog": ["a sausage in a bun"], "rainbow": ["a rainbow in the sky"], "full moon": ["a round yellow moon"],
    "red apple": ["a ripe red apple"], "green apple": ["a sour green apple"], "hamburger": ["a burger with cheese"],
    "doughnut": ["a donut with icing"], "nauseated face": ["a sick green face"], "hot face": ["a red sweating face"],
    "cold face": ["a frozen blue face"], "face with tears of joy": ["a face laughing with tears"],
    "loudly crying face": ["a face that cries rivers of tears"],
    "smiling face with sunglasses": ["a cool face with shades"],
    "smiling face with heart-eyes": ["a face in love"], "robot": ["a robot's head"], "rocket": ["a flying rocket"],
    "soccer ball": ["a black and white football"], "basketball": ["an orange basketball"], "bus": ["a city bus"],
    "school": ["a school building"], "hospital": ["a hospital building"], "house": ["a small house"],
    "house with garden": ["a house and a tree"], "fire engine": ["a red fire truck"],
    "police car": ["a police cruiser"],
    "hot beverage": ["a steaming cup of coffee"], "birthday cake": ["a cake with candles"], "key": ["a golden key"],
    "wrapped gift": ["a present with a bow"], "red heart": ["a red love heart"], "fire": ["a burning fire"],
    "evergreen tree": ["a fir tree"], "deciduous tree": ["a leafy tree"], "palm tree": ["a palm on the beach"],
    "snowman": ["a snowman in the snow"], "volcano": ["an erupting volcano"], "frog": ["a green frog's face"],
    "panda": ["a black and white bear"], "jack-o-lantern": ["a carved pumpkin"], "umbrella": ["an open umbrella"],
}  # fmt: skip
PAIRS = {"skis", "jeans", "shorts", "gloves", "socks", "briefs", "glasses", "goggles", "scissors"}
# Last words of symbols that take an article though they are signs.
OPEN_ARTICLE = {"circle", "square", "diamond", "heart", "button", "arrow", "loop", "cross", "sign", "mark", "balloon",
                "bubble", "symbol", "badge", "star", "triangle", "flag"}  # fmt: skip
# Keywords that say how a face looks.
SYNONYM_ADJECTIVES = {
    "angry", "mad", "happy", "sad", "tired", "sleepy", "sick", "scared", "surprised", "shocked", "cool", "silly",
    "crazy",
    "hot", "cold", "drunk", "rich", "worried", "nervous", "disappointed", "embarrassed", "confused", "annoyed", "bored",
    "cheerful", "evil", "hungry", "hurt", "grumpy", "furious", "upset", "unhappy", "shy", "smug", "dizzy", "frozen",
    "freezing", "frustrated", "anxious", "smiling", "grinning", "crying", "winking", "kissing", "laughing", "frowning",
    "nauseated", "exhausted", "sweating", "enraged", "goofy", "weird", "sarcastic", "skeptical", "mischievous",
    "delicious",
}  # fmt: skip
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "mouse": "mice", "goose": "geese", "ox": "oxen", "die": "dice", "wolf": "wolves", "leaf": "leaves",
    "loaf": "loaves",
    "scarf": "scarves", "knife": "knives", "shelf": "shelves", "fish": "fish", "sheep": "sheep", "deer": "deer",
    "bison": "bison", "shrimp": "shrimp", "squid": "squid", "sheaf": "sheaves", "tornado": "tornadoes",
    "potato": "potatoes", "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes", "mosquito": "mosquitoes", "buffalo": "buffaloes", "cactus": "cacti", "series": "series",
    "blowfish": "blowfish", "jellyfish": "jellyfish", "mailbox": "mailboxes", "sake": "sake", "torpedo": "torpedoes",
    "rickshaw": "rickshaws", "snowman": "snowmen", "craft": "craft", "firefighter": "firefighters", "genie": "genies",
}  # fmt: skip
_PREPOSITIONS = re.compile(
    r" (with|of|in|on|at|up|down|for|behind|over|from|into|without|wearing|seen|showing|under|that|who|pointing|tilted"
    r"|facing) "
)


def indefinite(phrase: str) -> str:
    """`phrase` after a or an, by the sound it begins with."""
    low = phrase.lower()
    says_you = re.match(r"(uni(?!n)|eu|ewe|one\b|one-|use|ufo|utility)", low)
    spelt = re.match(r"(x-ray|8|11|18|sos|ng\b|mx\b)", low)
    vowel = (low[0] in "aeiou" and not says_you) or low.startswith(("hour", "honest")) or (spelt and low[:2] != "mx")
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(phrase: str) -> str:
    """The plural of a countable phrase: of its head, the word before the first preposition."""
    match = _PREPOSITIONS.search(f"{phrase} ")
    head, tail = (phrase[: match.start()], phrase[match.start() :]) if match else (phrase, "")
    before, _, word = head.rpartition(" ")
    return f"{before} {_plural_word(word)}{tail}".strip()


def _plural_word(word: str) -> str:
    low = word.lower()
    if low in IRREGULAR:
        return IRREGULAR[low]
    if low.endswith("man") and low not in {"human", "shaman", "talisman"}:
        return word[:-3] + "men"
    if re.search(r"(s|x|z|ch|sh)$", low):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", low):
        return f"{word[:-1]}ies"
    return f"{word}s"
