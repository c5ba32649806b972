"""The narrow world of pocket: what it knows, as plain tables.

Facts only, written down by hand for this model. Everything that a skill asks about comes from here.
"""

from __future__ import annotations

COUNTRIES: dict[str, tuple[str, str]] = {
    "France": ("Paris", "Europe"), "Germany": ("Berlin", "Europe"), "Italy": ("Rome", "Europe"),
    "Spain": ("Madrid", "Europe"), "Portugal": ("Lisbon", "Europe"), "Austria": ("Vienna", "Europe"),
    "Belgium": ("Brussels", "Europe"), "Denmark": ("Copenhagen", "Europe"), "Norway": ("Oslo", "Europe"),
    "Sweden": ("Stockholm", "Europe"), "Finland": ("Helsinki", "Europe"), "Poland": ("Warsaw", "Europe"),
    "Greece": ("Athens", "Europe"), "Hungary": ("Budapest", "Europe"), "Ireland": ("Dublin", "Europe"),
    "Iceland": ("Reykjavik", "Europe"), "Romania": ("Bucharest", "Europe"), "Bulgaria": ("Sofia", "Europe"),
    "Croatia": ("Zagreb", "Europe"), "Serbia": ("Belgrade", "Europe"), "Ukraine": ("Kyiv", "Europe"),
    "Estonia": ("Tallinn", "Europe"), "Latvia": ("Riga", "Europe"), "Lithuania": ("Vilnius", "Europe"),
    "Slovenia": ("Ljubljana", "Europe"), "Japan": ("Tokyo", "Asia"), "China": ("Beijing", "Asia"),
    "India": ("New Delhi", "Asia"), "Thailand": ("Bangkok", "Asia"), "Vietnam": ("Hanoi", "Asia"),
    "Nepal": ("Kathmandu", "Asia"), "Iran": ("Tehran", "Asia"), "Iraq": ("Baghdad", "Asia"),
    "Mongolia": ("Ulaanbaatar", "Asia"), "Indonesia": ("Jakarta", "Asia"), "Egypt": ("Cairo", "Africa"),
    "Kenya": ("Nairobi", "Africa"), "Morocco": ("Rabat", "Africa"), "Ghana": ("Accra", "Africa"),
    "Nigeria": ("Abuja", "Africa"), "Tunisia": ("Tunis", "Africa"), "Senegal": ("Dakar", "Africa"),
    "Ethiopia": ("Addis Ababa", "Africa"), "Canada": ("Ottawa", "North America"),
    "Mexico": ("Mexico City", "North America"), "Cuba": ("Havana", "North America"),
    "Jamaica": ("Kingston", "North America"), "Brazil": ("Brasilia", "South America"),
    "Argentina": ("Buenos Aires", "South America"), "Chile": ("Santiago", "South America"),
    "Peru": ("Lima", "South America"), "Colombia": ("Bogota", "South America"),
    "Uruguay": ("Montevideo", "South America"), "Australia": ("Canberra", "Oceania"),
    "New Zealand": ("Wellington", "Oceania"),
}  # fmt: skip
"""Country → (capital, continent)."""

COLOURS: dict[str, str] = {
    "grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sky": "blue", "a banana": "yellow",
    "a tomato": "red", "a lemon": "yellow", "a carrot": "orange", "milk": "white", "a strawberry": "red",
    "chocolate": "brown", "a crow": "black", "a flamingo": "pink", "a frog": "green", "the sun": "yellow",
    "an elephant": "grey", "a polar bear": "white", "a pumpkin": "orange", "a plum": "purple", "a cucumber": "green",
    "salt": "white", "a cherry": "red", "gold": "yellow", "a mouse": "grey", "a pea": "green", "the sea": "blue",
    "a pig": "pink", "wood": "brown", "a swan": "white", "an eggplant": "purple", "a fire engine": "red",
}  # fmt: skip
"""Thing with its article → colour."""

SOUNDS: dict[str, str] = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "pig": "oink", "duck": "quack", "lion": "roar",
    "bee": "buzz", "snake": "hiss", "frog": "croak", "owl": "hoot", "rooster": "cock-a-doodle-doo", "mouse": "squeak",
    "wolf": "howl", "horse": "neigh", "crow": "caw",
}  # fmt: skip

YOUNG: dict[str, str] = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "pig": "piglet", "duck": "duckling",
    "lion": "cub", "horse": "foal", "goat": "kid", "hen": "chick", "frog": "tadpole", "goose": "gosling",
    "deer": "fawn", "kangaroo": "joey", "swan": "cygnet",
}  # fmt: skip

HOMES: dict[str, str] = {
    "bee": "hive", "bird": "nest", "rabbit": "burrow", "spider": "web", "horse": "stable", "lion": "den",
    "dog": "kennel", "pig": "sty", "fish": "bowl", "king": "palace", "monk": "monastery", "hen": "coop",
}  # fmt: skip

LEGS: dict[str, str] = {
    "dog": "four", "cat": "four", "spider": "eight", "ant": "six", "bird": "two", "snake": "no", "horse": "four",
    "bee": "six", "hen": "two", "fish": "no", "cow": "four", "duck": "two", "beetle": "six", "worm": "no",
}  # fmt: skip

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("happy", "sad"), ("light", "dark"),
    ("rich", "poor"), ("early", "late"), ("full", "empty"), ("open", "closed"), ("strong", "weak"), ("hard", "soft"),
    ("high", "low"), ("long", "short"), ("wet", "dry"), ("clean", "dirty"), ("loud", "quiet"), ("near", "far"),
    ("thick", "thin"), ("wide", "narrow"), ("sweet", "bitter"), ("right", "wrong"), ("up", "down"),
    ("black", "white"), ("day", "night"), ("first", "last"), ("love", "hate"), ("buy", "sell"), ("push", "pull"),
    ("win", "lose"), ("give", "take"), ("begin", "end"), ("above", "below"), ("inside", "outside"),
    ("always", "never"), ("before", "after"), ("friend", "enemy"), ("summer", "winter"), ("north", "south"),
    ("east", "west"), ("true", "false"), ("deep", "shallow"), ("cheap", "expensive"), ("easy", "difficult"),
    ("smooth", "rough"),
)  # fmt: skip
"""Pairs; each is asked both ways round."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

UNITS: dict[tuple[str, str], str] = {
    ("seconds", "minute"): "60", ("minutes", "hour"): "60", ("hours", "day"): "24", ("days", "week"): "7",
    ("months", "year"): "12", ("weeks", "year"): "52", ("days", "year"): "365", ("years", "decade"): "10",
    ("years", "century"): "100", ("centimetres", "metre"): "100", ("metres", "kilometre"): "1000",
    ("grams", "kilogram"): "1000", ("millimetres", "centimetre"): "10", ("things", "dozen"): "12",
    ("cents", "euro"): "100", ("sides", "triangle"): "3", ("sides", "square"): "4", ("sides", "hexagon"): "6",
    ("wheels", "bicycle"): "2", ("wheels", "car"): "4", ("strings", "guitar"): "6", ("strings", "violin"): "4",
    ("fingers", "hand"): "5", ("letters", "alphabet"): "26", ("seasons", "year"): "4",
    ("players", "football team"): "11",
}  # fmt: skip
"""(parts, whole) → how many."""

LANGUAGES = ("French", "German", "Spanish")
TRANSLATIONS: dict[str, tuple[str, str, str]] = {
    "dog": ("chien", "Hund", "perro"), "cat": ("chat", "Katze", "gato"), "house": ("maison", "Haus", "casa"),
    "water": ("eau", "Wasser", "agua"), "bread": ("pain", "Brot", "pan"), "milk": ("lait", "Milch", "leche"),
    "book": ("livre", "Buch", "libro"), "tree": ("arbre", "Baum", "árbol"), "sun": ("soleil", "Sonne", "sol"),
    "moon": ("lune", "Mond", "luna"), "fire": ("feu", "Feuer", "fuego"), "hand": ("main", "Hand", "mano"),
    "friend": ("ami", "Freund", "amigo"), "night": ("nuit", "Nacht", "noche"), "day": ("jour", "Tag", "día"),
    "red": ("rouge", "rot", "rojo"), "green": ("vert", "grün", "verde"), "blue": ("bleu", "blau", "azul"),
    "white": ("blanc", "weiß", "blanco"), "black": ("noir", "schwarz", "negro"), "one": ("un", "eins", "uno"),
    "two": ("deux", "zwei", "dos"), "three": ("trois", "drei", "tres"), "four": ("quatre", "vier", "cuatro"),
    "apple": ("pomme", "Apfel", "manzana"), "fish": ("poisson", "Fisch", "pez"),
    "horse": ("cheval", "Pferd", "caballo"),
    "bird": ("oiseau", "Vogel", "pájaro"), "school": ("école", "Schule", "escuela"),
    "city": ("ville", "Stadt", "ciudad"),
    "hello": ("bonjour", "hallo", "hola"), "thank you": ("merci", "danke", "gracias"), "yes": ("oui", "ja", "sí"),
    "cheese": ("fromage", "Käse", "queso"), "flower": ("fleur", "Blume", "flor"), "door": ("porte", "Tür", "puerta"),
}  # fmt: skip
"""English → French, German, Spanish."""

JOBS: dict[str, str] = {
    "baker": "bakes bread", "teacher": "teaches children", "farmer": "grows food", "doctor": "helps sick people",
    "pilot": "flies planes", "painter": "paints pictures", "cook": "cooks meals", "singer": "sings songs",
    "writer": "writes books", "tailor": "makes clothes", "gardener": "plants flowers", "dentist": "looks after teeth",
    "carpenter": "works with wood", "sailor": "sails ships", "driver": "drives cars", "shepherd": "looks after sheep",
    "fireman": "puts out fires", "postman": "brings letters", "clown": "makes people laugh", "miner": "digs for coal",
}  # fmt: skip

PLURALS: dict[str, str] = {
    "mouse": "mice", "child": "children", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "city": "cities", "baby": "babies",
    "box": "boxes", "bus": "buses", "dog": "dogs", "cat": "cats", "book": "books", "potato": "potatoes", "key": "keys",
    "sheep": "sheep", "fish": "fish", "wife": "wives", "church": "churches", "fly": "flies",
}  # fmt: skip

PAST: dict[str, str] = {
    "go": "went", "see": "saw", "eat": "ate", "drink": "drank", "run": "ran", "sing": "sang", "write": "wrote",
    "buy": "bought", "give": "gave", "take": "took", "make": "made", "come": "came", "swim": "swam", "fly": "flew",
    "sleep": "slept", "read": "read", "teach": "taught", "find": "found", "break": "broke", "walk": "walked",
    "speak": "spoke", "play": "played", "know": "knew", "think": "thought",
}  # fmt: skip

KINDS: dict[str, str] = {
    "rose": "flower", "tulip": "flower", "daisy": "flower", "oak": "tree", "pine": "tree", "birch": "tree",
    "apple": "fruit", "banana": "fruit", "pear": "fruit", "cherry": "fruit", "carrot": "vegetable",
    "potato": "vegetable", "onion": "vegetable", "eagle": "bird", "sparrow": "bird", "penguin": "bird",
    "salmon": "fish", "trout": "fish", "shark": "fish", "ant": "insect", "bee": "insect", "beetle": "insect",
    "piano": "instrument", "violin": "instrument", "drum": "instrument", "hammer": "tool", "saw": "tool",
    "chair": "piece of furniture", "table": "piece of furniture", "shirt": "piece of clothing",
    "hat": "piece of clothing", "lion": "mammal", "whale": "mammal", "horse": "mammal", "lizard": "reptile",
    "snake": "reptile",
}  # fmt: skip

PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")

FIRST_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karl", "Lena", "Maria", "Nora",
    "Oscar", "Paul", "Rosa", "Simon", "Tina", "Viktor", "Walter", "Yara", "Adam", "Bella", "Carlos", "Diana", "Erik",
    "Fiona", "George", "Hanna", "Ivan", "Julia", "Kevin", "Laura", "Martin", "Nina", "Otto", "Peter", "Robert",
    "Sarah", "Thomas", "Ursula", "Vera", "William", "Zoe", "Alice", "Bruno", "Chloe", "Daniel", "Elena", "Frank",
    "Grace", "Henry", "Irene", "Jack", "Kate", "Leo", "Mia", "Nick", "Olga", "Sam", "Tom", "Lucy", "Max", "Eva",
)  # fmt: skip

CITIES = (
    "London", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Lisbon", "Dublin", "Prague", "Athens", "Cairo",
    "Tokyo", "Lima", "Boston", "Hamburg", "Milan", "Geneva", "Bergen", "Porto", "Lyon", "Zurich", "Munich", "Naples",
)  # fmt: skip

FOODS = ("tea", "coffee", "rice", "soup", "bread", "cheese", "milk", "honey", "cake", "fish", "juice", "pizza")
THINGS = (
    "book", "ball", "lamp", "chair", "table", "hat", "coat", "cup", "bag", "box", "pen", "key", "ring", "clock",
    "spoon", "plate", "shoe", "coin", "stone", "apple", "pear", "egg", "flower", "letter", "picture", "bottle",
)  # fmt: skip
ANIMALS = (
    "dog", "cat", "cow", "horse", "pig", "sheep", "goat", "duck", "hen", "goose", "mouse", "rabbit", "fox", "wolf",
    "bear", "lion", "tiger", "monkey", "owl", "eagle", "frog", "snake", "fish", "bee", "ant", "spider", "whale",
)  # fmt: skip
ADJECTIVES = (
    "red", "green", "blue", "yellow", "white", "black", "big", "small", "old", "new", "happy", "sad", "warm", "cold",
    "fast", "slow", "clean", "dirty", "quiet", "loud", "soft", "hard", "strong", "little", "long", "short",
)  # fmt: skip
PLACES = (
    "garden", "kitchen", "school", "park", "office", "library", "station", "market", "forest", "harbour", "hotel",
    "museum", "hospital", "river", "bridge", "village", "castle", "island", "theatre", "bakery",
)  # fmt: skip

PRODUCTS = (
    "laptop", "printer", "phone", "tablet", "camera", "router", "monitor", "keyboard", "headset", "speaker",
    "scanner", "charger", "toaster", "kettle", "vacuum cleaner", "washing machine", "coffee machine", "smart watch",
    "game console", "hard drive",
)  # fmt: skip
PROBLEMS = (
    "does not start", "makes a loud noise", "is too slow", "has a cracked screen", "gets very hot",
    "keeps losing the connection", "shows an error message", "does not charge", "smells of smoke",
    "has a broken button",
    "switches itself off", "came without a cable", "is missing a part", "arrived too late", "has the wrong colour",
    "leaks water", "does not make any sound", "does not react", "has a dead battery", "blinks all the time",
)  # fmt: skip

SEA_WORDS = (
    "ahoy", "matey", "captain", "treasure", "parrot", "ship", "sail", "anchor", "crew", "deck", "island", "pirate",
    "aye", "arr", "seas", "rum", "map", "cannon", "mast", "harbour",
)  # fmt: skip

HURRY: dict[str, tuple[str, ...]] = {
    "high": (
        "It is urgent!",
        "I need it today.",
        "Please answer at once.",
        "I cannot wait.",
        "It must work by tonight.",
    ),
    "medium": ("Please answer this week.", "I need it next week.", "Please answer soon.", "It should work by {day}."),
    "low": ("There is no hurry.", "Take your time.", "I can wait.", "Next month is fine.", "It is not urgent."),
}
"""Urgency → sentences that show it."""
