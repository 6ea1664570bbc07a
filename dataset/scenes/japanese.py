"""What is said about rendered scenes, in Japanese: a third language, which the stand-ins never met.

To add another language, write a file like this one and list it in MORE_LANGUAGES (text.py). The
Japanese here is the simple kind: every word fits every slot it is put into, so nothing is inflected
(赤の星, 大きめの星, 星は赤です, 星は大きめです).
"""

# The Japanese word for each English word that fills a slot.
WORDS = {
    "red": "赤", "orange": "オレンジ", "yellow": "黄色", "green": "緑",
    "blue": "青", "purple": "紫", "pink": "ピンク", "black": "黒",
    "circle": "丸", "square": "四角", "triangle": "三角",
    "star": "星", "heart": "ハート", "cross": "十字",
    "small": "小さめ", "medium": "中くらい", "large": "大きめ",
    "left": "左", "right": "右", "above": "上", "below": "下",
    "first": "1枚目", "second": "2枚目",
}  # fmt: skip

RELATION_ANSWER = (
    "{color}の{shape}は{place}、{other_color}の{other_shape}は{other_place}"
    "にあるので、{answer}です。"
)
# A text, or (question, answer); names and slots are those of TEMPLATES in text.py.
TEMPLATES = {
    "thing": "{size}の{color}の{shape}（{place}）",
    "separator": "、",
    "stop": "。",
    "caption": "この画像を説明してください。",
    "color": ("{shape}は何色ですか。", "{shape}は{color}です。"),
    "shape": ("{color}のものはどんな形ですか。", "{color}のものは{shape}です。"),
    "size": ("{color}の{shape}はどのくらいの大きさですか。", "{color}の{shape}は{size}です。"),
    "count": ("ものは全部でいくつありますか。", "ものの数は{number}です。"),
    "count_shape": ("{shape}はいくつありますか。", "{shape}の数は{number}です。"),
    "count_color": ("{color}のものはいくつありますか。", "{color}のものの数は{number}です。"),
    "relation_column": (
        "{color}の{shape}は{other_color}の{other_shape}の左にありますか、右にありますか。",
        RELATION_ANSWER,
    ),
    "relation_row": (
        "{color}の{shape}は{other_color}の{other_shape}の上にありますか、下にありますか。",
        RELATION_ANSWER,
    ),
    "which_image": (
        "{color}の{shape}はどちらの画像にありますか。",
        "{color}の{shape}は{which}の画像にあります。",
    ),
    "in_image": ("{which}の画像の{shape}は何色ですか。", "{which}の画像の{shape}は{color}です。"),
    "difference": ("2枚の画像の違いは何ですか。", "{before}が{after}に変わりました。"),
}
