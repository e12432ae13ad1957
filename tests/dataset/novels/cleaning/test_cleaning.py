"""What cleaning takes out of novels and what it leaves: rules, their examples, labelled lines, real books."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.novels.cleaning.cleaning import clean, load_rules, to_simplified
from dataset.novels.cleaning.rules import RULES_FILE, refuse_slow
from novelgpt.settings.errors import UserError

NOVELS = Path(__file__).resolve().parents[5] / "shared" / "data" / "novels"
ENCODINGS = {"gbk": "gb18030", "big5": "big5hkscs", "utf8": "utf-8-sig", "utf8bom": "utf-8-sig"}
RULES = load_rules()
QUOTES = "“”‘’「」『』《》…—"

# Lines written for these tests, one a line. The held-back ones were written before the rules and never looked at while
# the rules were tuned.
TUNING_ADS = r"""
手机用户请浏览m.qingyunshuwu.com阅读，更优质的用户体验。
一秒记住【青云书屋】www.qingyunshuwu.com，为您提供精彩小说阅读。
最新章节请访问青云书屋 http://www.qingyunshuwu.net
本书首发青云中文网，请支持正版！
更多精彩小说请登录ｗｗｗ．ｑｉｎｇｙｕｎ．ｃｏｍ
请收藏本站：www.qingyun.cc，手机版：m.qingyun.cc
【本书由青云小说网整理上传】
更多TXT电子书下载，请访问：http://www.qingyun.com
ｗＷw.qＩngyuＮ．c＊o＊m　青/云/小\说、网
w w w . q i n g y u n . n e t
天才一秒记住本站地址：qingyun.net
记住本站网址，www.qingyun.org，方便下次阅读
（青云小说网 www.qingyun.com）
看最快更新的章节，请到青云小说网
百度搜索“青云小说网”看最新章节
手-机-用-户-请-访-问 ｗａｐ．ｑｉｎｇｙｕｎ．ｃｎ
txt下载地址：http://www.qingyun.com/txt/1234.html
手机阅读：http://m.qingyun.com/book/1234/
青云书屋友情提示：请记住本站域名
小说下载尽在青云书屋 http://www.qingyun.cc
本章未完，点击下一页继续阅读
小主子，这个章节后面还有哦，请点击下一页继续阅读，后面更精彩！
喜欢这本书请大家收藏：(www.qingyun.com)本书更新速度全网最快。
更新时间：2013-05-06 18:30:02　字数：3056
更新時間:2009/11/2 12:00:00 本章字數:3321
本章字数：2987字
（本章共3021字）
字数：3,102
第三十二章 更新于：2012-8-3 10:22
本书作品版权归作者所有，请在下载后24小时内删除
版权声明：本书由网友上传，本站不承担任何法律责任。
本电子书仅供试读交流，请支持正版，不得用于商业用途。
如果您喜欢本书，请购买正版图书！
如侵犯了您的版权，请联系我们，我们将立即删除
------------------------
＝＝＝＝＝＝＝＝＝＝
**********
～～～～～～～～～～～～
PS：今天只有一更，明天补上，求推荐票！
ps:第二更送到，求收藏求月票~~
（PS：求收藏，求推荐，各种求！）
P.S. 感谢“风吹麦浪”大大的打赏，么么哒！
求月票！求推荐票！求收藏！
今日第三更，求月票支持！
感谢书友“山中客”打赏的100起点币！
感谢月下独酌、老张、小鱼儿的月票和推荐票。
（求收藏、求推荐！！！）
为盟主“青山”加更，今天还有一章。
昨天卡文了，今天三更补偿大家，求推荐票。
新书上传，求收藏，求推荐票，您的支持是我最大的动力！
作者有话说：这一章写得我好累，大家晚安~
作者有话要说：下一章有大事发生哦
（本章完）
（未完待续）
(未完待续，如欲知后事如何，请登录www.qingyun.com，章节更多，支持作者，支持正版阅读！)
【未完待续】
上一章 返回目录 下一章
上一页　目录　下一页　加入书签
＜上一章＞＜目录＞＜下一章＞
加入书签，方便阅读
<<青云志>>最新章节 第三十章
点击收藏本书，投推荐票
"""
TUNING_PROSE = """
“求您收藏我这幅字吧。”老人说着，把卷轴往前推了推。
他点了下载，进度条停在百分之九十九，一动不动。
这个网站他再熟悉不过，每天晚上都要登上去看一看。
“你把网址发给我，我晚上看看。”小李头也不抬。
他打开浏览器，输入www.baidu.com，按下回车，等了足有一分钟。
“我的QQ是12345678，回头你加我。”
人间若有天堂，大概就是这样一个黄昏。
他以为自己到了天堂。
那家店的名字叫天堂鸟，门口挂着两盏红灯笼。
林晚把小说合上，关了灯，却怎么也睡不着。
她在网上连载小说，已经写了三年，读者不过几十个人。
“今天更新了吗？”室友凑过来问。
“更新时间是晚上八点，你急什么？”他笑着说。
他说自己的版权早就卖了，卖了三千块。
“版权归谁？”律师推了推眼镜，“合同上没有写。”
“请支持正版！”街边的小贩举着一张盗版光盘喊道。
感谢上天，让我活着回来了。
感谢的话他说了一箩筐，可是没有一句是真心的。
她求的不是荣华，也不是推荐信，只是一个公道。
老板说今晚加更两个时辰，工钱照算。
“月票丢了，只好走回去。”他苦笑了一下。
他办了一张公交月票，每天坐车来回。
“PS我学过一点，修张照片没问题。”小陈说。
他在信的末尾写道：PS，替我看看那盆兰花。
信写到这里没有写完，后面是一大片空白。
故事到这里还没有完，第二天又来了一个人。
“未完待续”四个字写在最后一页上，墨迹已经淡了。
这件事还未完，那件事又来了。
第二天一早，他去了书店，买了一本新书。
他翻到下一页，愣住了。
“下一章讲什么？”孩子仰着头问说书的老人。
上一章他没有看懂，下一章更看不懂，索性把书合上了。
“书友会在礼拜天，你来不来？”
手机响了，用户正忙，请稍后再拨。
“您拨打的用户已关机，请稍后再拨。”
一秒钟后，他记住了那个名字。
他只用一秒就记住了她的地址。
“请记住我们的约定。”她轻轻地说。
本书是他父亲留下的，纸已经发黄了。
“本书不外借。”管理员冷冷地说。
首发阵容里没有他，他坐在替补席上，一声不吭。
书包里装着半个馒头和一本练习簿。
书屋的门开着，里面一个人也没有。
两人相视一笑——那笑里什么都有。
……
“……”
——
他想了一夜：去，还是不去？
P先生推门进来，S小姐站了起来。
net这个词，他只认得，不会念。
“com口坏了，换一根线试试。”工程师说。
他把U盘插上，拷了一个txt文件，名字叫“遗书”。
一共三千零五十六字，他数了两遍。
他写的那一章，字数不多，却费了整整一个月。
2013年5月6日，他离开了那座城。
二〇一三年五月六日，晴。
更新换代的时间越来越短，老厂跟不上了。
作者有话说，读者也有话说，吵成了一团。
“作者是谁？”“不知道，书上没有写。”
阿Ｑ没有家，住在未庄的土谷祠里。
他的月薪是5000元，房租就要2000。
"""
HELD_BACK_ADS = r"""
手机用户请到m.baiyunge.com阅读。
一秒记住【白云阁】，精彩小说无弹窗免费阅读！
最快更新，无错阅读，请访问 www.baiyunge.com
最新最快章节，请到白云阁小说网 www.baiyunge.net 免费阅读
本文由白云阁首发，转载请注明出处：http://www.baiyunge.com/
本站网址：www.baiyunge.cc 请牢记
ｗｗｗ。ｂａｉ　ｙｕｎｇｅ。ｃｏｍ
ＷwＷ、baiＹun ge、nＥt　白\云/阁
http://www.baiyunge.com/book/88/1024.html
【白云阁 baiyunge.com】
（白云阁小说网，更多好书等你来看）
更多最新最全的小说，尽在白云阁
欢迎广大书友光临阅读，最新、最快、最火的连载作品尽在白云阁！
推荐阅读：白云阁 http://www.baiyunge.com
请大家收藏：（www.baiyunge.com）青云志白云阁更新速度全网最快。
请記住本書首發域名：baiyunge.com。手機版閱讀網址：m.baiyunge.com
天才壹秒記住『白云阁』，為您提供精彩小說閱讀。
TXT电子书免费下载 www.baiyunge.com
全本TXT下载尽在白云阁
本书下载自白云阁，如需更多好书，请访问白云阁
声明：本书为白云阁(www.baiyunge.com)的用户上传，仅代表发布者个人行为
本书由“白云阁”免费制作，更多好书敬请登录
这章没有结束，请点击下一页继续阅读！
本章节未完，请翻页
百度一下“青云志白云阁”第一时间免费阅读
QQ群：123456789，欢迎书友加入
更新时间：2015-1-9 0:05:33　本章字数：2210
发布时间：2011-03-18 21:06
本章字數：4010
字数统计：3344字
本书仅供个人学习使用，请于下载后24小时内删除
作品仅供预览，请勿用于商业用途，喜欢请购买正版。
本站所有资源均来自网络，版权归原作者所有，如有侵权请联系删除。
版权所有，转载必究
==========
- - - - - - - - - - - -
☆☆☆☆☆☆☆☆☆☆
_________________
PS：求票求票求票！
ps：这两天出差，更新不稳定，大家见谅。
（ps.明天上架，求首订！）
PS1：感谢各位书友一直以来的支持。
【求收藏，求推荐票】
第二更到，求推荐票，求收藏。
今天两更完毕，求月票！
感谢“一笑而过”的588打赏，感谢“老陈”的月票！
感谢书友2012345678的打赏，谢谢！
推荐票满一千加更，大家加油投票啊！
(今日第一更，稍后还有一更，求推荐求收藏！)
新的一月，求保底月票！
作者的话：今天状态不好，只写了这么多。
作者有话说：谢谢大家的地雷和营养液！
亲们，看完记得投票收藏哦，么么哒
推荐一本朋友的新书《剑来山》，书荒的可以看看。
(本章完)
未完待续。。。
（未完待續）
【本章完】
←上一章　返回书目　下一章→
上一章｜目录｜下一章
返回目录　加入书架　推荐本书
"""
HELD_BACK_PROSE = """
“这幅画值得收藏，求先生割爱。”掌柜的陪着笑脸。
她下载了一张地图，照着走，还是走丢了。
“公司的网站又打不开了。”秘书急得直跺脚。
他在纸条上写了一行字：www.helpme.com，塞进了门缝。
“登录http://www.school.com就能查成绩。”老师在黑板上写。
邮箱是lin@mail.com，密码是她的生日。
上有天堂，下有苏杭，他却哪里也不想去。
小说里的人都是假的，他心里清楚得很。
“你天天写小说，能写出钱来吗？”父亲问。
编辑来信说，小说下个月首发，稿费另算。
本站停车两分钟，请下车的旅客做好准备。
“本站是终点站。”列车员一节车厢一节车厢地喊。
“最新章节还没出来呢，”同桌小声说，“我都急死了。”
请访客在门口登记，不得入内。
手机没电了，用户名也忘了，他只好去网吧。
感谢你，老师。
“感谢大家的支持！”他举起酒杯，一饮而尽。
感谢父母，感谢朋友，感谢每一个打赏过他的陌生人，直播间里他泣不成声。
他求票求了三天，才求到一张回家的火车硬座。
“求求你，投我一票吧！”班长挨个鞠躬。
“再加一更，天就亮了。”更夫敲着梆子走远了。
三更天，雨还没有停。
二更刚过，门外传来了脚步声。
第三更的梆子响过，山贼才摸到墙根下。
他每个月的月票是单位给买的，推荐信也是单位开的。
盟主之位，今日便要见个分晓！
“盟主万岁！”群雄齐声高呼。
“有话就说，”作者摘下眼镜，“我听着。”
PSP在他手里转了一圈，又塞回兜里。
“照片是P的吧？”“没PS过，就是真的。”
话未完，门已经被推开了。
未完成的画靠在墙角，落满了灰。
完了，全完了！他想。
本章程自公布之日起施行，违者罚银十两。
他念到这一章，忽然停住了：书页被人撕去了半张。
翻到下一页，只有一行字：别回头。
他把目录看了一遍，又回到上一章，从头读起。
合同第三条写着：版权归甲方所有，乙方不得转载。
“二十四小时内删除所有照片，不然我就报警！”她咬着牙说。
二十四小时之内，他必须离开这座城市。
“正版的太贵，买张盗版的算了。”
请您购买两张车票，一张去，一张回。
侵权这种事，他见得多了，立即写了一封律师函。
他把群名改成了“白云阁”，里面只有三个人。
QQ上她的头像一直是灰色的。
“加个微信吧，号码是wx20130506。”
系统提示：叮！恭喜宿主获得新手大礼包一份。
【姓名：林枫】【等级：12】【经验：3500/5000】
【任务完成，奖励积分1000点】
“-----”电报机里传来一阵杂音。
雪，还在下。
——“你来了。”
一千零二十四，二千零四十八，他一笔一笔地加。
字数不够，他又添了两行，凑满八百字交了上去。
1937年7月7日
2015-1-9，这个日期刻在石头上，像一道伤口。
三月十八日，发布会如期举行，台下坐满了记者。
她有一个书包，蓝色的，上面绣着一只兔子。
“书友你好，我是来还书的。”门外的人说。
T恤上印着NET三个字母，洗得发白。
WWW，他在沙地上写下三个字母，像三只飞鸟。
"""
# Prose with an advertisement glued to it: what stays, what goes.
GLUED = [
    ("　　他看了看天，雨还没有停。", "wＷw：qingyun？nettxt?小说/\\天、堂"),
    ("“你来了。”", "www.qingyun.com"),
    ("她没有回头。", "（www.qingyun.net 青云小说网）"),
    ("灯灭了……", "ww　w.qＩngyun.。net"),
    ("门外站着一个人。", "(未完待续)"),
    ("他笑了笑，走了！", "【青云小说网 www.qingyun.cc 最快更新】"),
    ("夜更深了。", "手机用户请浏览m.qingyun.com阅读，更优质的用户体验。"),
    ("谁也没有说话。", "（本章完）"),
]


def bare(text):
    return "".join(text.split())


def lines(block):
    return block.strip().split("\n")


def in_a_chapter(line, position=3):
    """The line among prose of a long book: at the end of a chapter, or (position 30) in the middle of one."""
    chapter = ["　　天亮了，雨还没有停。"] * 60
    chapter.insert(60 - position + 3, line)
    return "\n".join(["　　雨下了一夜。"] * 50 + chapter + ["第三章 雨夜", *["　　雨下了一夜。"] * 50])


def what_stays(line, position=3):
    """The line after cleaning, and what was removed from the text around it or from itself."""
    text = in_a_chapter(line, position)
    number = text.split("\n").index(line) + 1
    cleaned = clean(text, RULES)
    return "\n".join(kept.text for kept in cleaned.lines if kept.number == number), cleaned.removed


def assert_law(text, cleaned):
    """Each character that is not white space stands in one line or in one removed part, in order."""
    parts, kept = defaultdict(list), defaultdict(str)
    for part in cleaned.removed:
        parts[part.number].append(bare(part.text))
    for line in cleaned.lines:
        kept[line.number] += line.text
    assert [line.number for line in cleaned.lines] == sorted(line.number for line in cleaned.lines)
    for number, source in enumerate(text.split("\n"), 1):
        assert sorted(bare(kept[number]) + "".join(parts[number])) == sorted(bare(source))
        for piece in (kept[number], *parts[number]):
            characters = iter(bare(source))
            assert all(character in characters for character in bare(piece)), "the order changed"
        if number not in parts:
            assert kept[number] == source.rstrip()


def test_every_rule_does_what_its_examples_say():
    for rule in RULES.rules:
        assert rule.removes and rule.about, f"{rule.name} has no example"
        for example in rule.removes:
            line, rest = (example, "") if isinstance(example, str) else example
            before = "" if rule.near in ("edges", "front") else "　　雨下了一夜。\n" * 50
            cleaned = clean(f"{before}{line}\n　　雨下了一夜。\n第三章 雨夜\n" + "　　雨下了一夜。\n" * 50, RULES)
            assert rule.name in {part.rule for part in cleaned.removed}, (rule.name, line)
            stays = "\n".join(kept.text for kept in cleaned.lines).removeprefix(before)
            assert stays[: stays.index("　　雨下")].strip() == rest.strip(), (rule.name, line)
        for line in rule.keeps:
            assert what_stays(line) == (line, []), (rule.name, line)


def test_no_rule_of_ours_is_slow_on_hostile_lines():
    for rule in RULES.rules:
        refuse_slow(rule, rule.name)


@pytest.mark.parametrize(
    ("advertisements", "prose"),
    [(TUNING_ADS, TUNING_PROSE), (HELD_BACK_ADS, HELD_BACK_PROSE)],
    ids=["tuning", "held_back"],
)
def test_precision_and_recall_on_labelled_lines(advertisements, prose):
    assert len(lines(advertisements)) > 60 and len(lines(prose)) > 60
    right = [line for line in lines(advertisements) if what_stays(line)[0] == ""]
    wrong = [line for line in lines(prose) for position in (3, 30) if what_stays(line, position) != (line, [])]
    assert len(right) >= 0.9 * len(lines(advertisements)), sorted(set(lines(advertisements)) - set(right))
    assert len(right) >= 0.99 * (len(right) + len(wrong)), wrong


@pytest.mark.parametrize(("prose", "advertisement"), GLUED)
def test_of_an_advertisement_glued_to_prose_only_itself_goes(prose, advertisement):
    stays, removed = what_stays(prose + advertisement)
    assert stays == prose
    assert "".join(part.text for part in removed) == advertisement


@pytest.mark.parametrize(
    "line", ["“你看，就是它。www.qingyun.com”", "“www.qingyun.com。”", "他写了三个字：www.qingyun.com"]
)
def test_an_address_in_speech_or_in_a_sentence_stays(line):
    assert what_stays(line) == (line, [])


HEADINGS = [
    ("第二章 渡口", "（求月票）"), ("第四章 开船", "【求收藏求推荐票】"), ("　　第五章 铜铃", "（第三更，求月票！）"),
    ("第六章：归人", "(感谢老陈的月票)"), ("第7章 雪", "（本章字数：3021）"), ("正文 第八章 夜", "（求推荐）"),
    ("番外一 旧事", "（求收藏求推荐）"), ("12. 渡口", "（求月票）"), ("第九章", " 更新时间:2012-8-3 10:22"),
    ("第十章 灯火", "  www.qingyun.com"), ("第十一回渡口旧信", "（求月票求推荐票）"),
]  # fmt: skip


@pytest.mark.parametrize(("heading", "junk"), HEADINGS)
def test_of_a_heading_only_what_stands_behind_it_goes(heading, junk):
    stays, removed = what_stays(heading + junk)
    assert stays == heading
    assert [part.text for part in removed] == [junk.strip()]


@pytest.mark.parametrize(
    "line",
    [
        "第二章 求月票",
        "第三章 最新章节列表",
        "第四章 起点中文网",
        "第五章 渡口 求推荐票",
        "第六章 感谢打赏（上）",
        "第七章 雪（下）",
    ],
)
def test_a_heading_that_says_what_advertisements_say_stays(line):
    assert what_stays(line) == (line, [])


def test_a_block_takes_no_heading():
    text = "内容简介：\n一个人回家。\n第一章 雨夜\n　　天亮了。\n正文\n　　雨停了。"
    assert clean(text, RULES).removed == []


ENGLISH = """
Ladies and gentlemen, welcome to Beijing.
Please come in.
I will never become a doctor, according to him.
My company has a network of accountants.
Maybe. Come here, Tom. Net income rose.
He typed it in. Me too.
“Comrade!”
W-E-L-C-O-M-E
I-N-T-E-R-N-E-T
The organization sent a comic to Connecticut
Soccer, tobacco, account; success, according, occur cc
lin@mail.com
"""


@pytest.mark.parametrize("line", [*lines(ENGLISH), *(f"他抬起头。{line}" for line in lines(ENGLISH))])
def test_english_is_no_address(line):
    assert what_stays(line) == (line, [])


ADDRESSES = """
记住网址𝓷𝓲𝔂𝓼𝔃.𝓬𝓸𝓶
𝐰𝐰𝐰.𝐧𝐢𝐲𝐬𝐳.𝐜𝐨𝐦
ⓦⓦⓦ.ⓝⓘⓨⓢⓩ.ⓒⓞⓜ
🅦🅦🅦.🅝🅘🅨🅢🅩.🅒🅞🅜
ｗｗｗ．ｎｉｙｓｚ．ｃｏｍ
ωωω.niysz.cοм
www.niуsz.соm
w​w​w.ni‍ysz.c⁠om
ｗ。ｗ。ｗ。ｎ、ｉ、ｙ、ｓ、ｚ。ｃ、ｏ、ｍ
w͜͡w͜͡w͜͡.n͜͡i͜͡y͜͡s͜͡z͜͡.c͜͡o͜͡m͜͡
ᴡᴡᴡ.ɴɪʏsᴢ.ᴄᴏᴍ
"""


@pytest.mark.parametrize("address", lines(ADDRESSES))
def test_an_address_in_odd_letters_goes_alone_and_behind_prose(address):
    assert what_stays(f"　　{address}")[0] == ""
    stays, removed = what_stays(f"　　他把船系好，没有回头。{address}")
    assert stays == "　　他把船系好，没有回头。"
    assert bare("".join(part.text for part in removed)).count("w") <= 3 and removed


@pytest.mark.parametrize(
    ("front", "junk", "back"),
    [
        ("雪停了。", '"奇-_-書--*--网-QＩＳuu.ｃＯm"', "台阶上放着一只竹篮。"),
        ("查收来信要快。", "wＷＷ。ＨＡＯＳｈuＤＵ.coＭ", "他把信又读了一遍。"),
        ("他把信", "wＷw．ｎｉysＺ．ｃoｍ", "又读了一遍。"),
        ("他把船系好，没有回头。", "书 包 网 txt小说上传分享", ""),
        ("天亮以后他们往南走。", "某某书库扫校下一章 回目录", ""),
        ("他来了。", "青*云*书*屋*最*新*章*节*首*发", ""),
    ],
)
def test_junk_glued_to_prose_goes_and_the_prose_stays(front, junk, back):
    stays, removed = what_stays(front + junk + back)
    assert stays == front + back
    assert "".join(part.text for part in removed) == junk


PROSE_LIKE_JUNK = """
村长在大会上求支持，求了三遍才有人举手支持他。
候选人站在台上：请大家投票支持我！
一秒钟记住一个地址，这是老周的本事。
请记住我们的地址，青石巷十七号。
天下好书尽在此楼。
本书由某社首发，印了三千册，全卖光了。
本书由先生整理，印过两版。
感谢武林盟主大人不杀之恩！
第三更到了，更夫敲着梆子走过。
看完记得还给先生。
小满打开了最新章节！
我——我——我——不——知——道
天、地、玄、黄，宇、宙、洪、荒。
PS：替我看看那盆兰花。
他输入ｗｗｗ．ａｂｃｄｅｆ．ｃｏｍ，按下回车。
他念道。www.abcdef.com上写着他的名字。
合同上写着，这张图仅供个人参考，不得用作商业用途。
"""


@pytest.mark.parametrize("line", lines(PROSE_LIKE_JUNK))
def test_prose_that_happens_to_say_such_words_stays(line):
    for position in (3, 30):
        assert what_stays(line, position) == (line, [])


def test_a_text_of_many_pieces_is_searched_to_its_end():
    text = "　　雨下了一夜，天亮了。\n" * 200_000 + "他来了。（本章完）\n------\n雨停了。"
    assert len(text) > 2 << 20
    removed = clean(text, RULES).removed
    assert removed == [(200_001, "chapter_end_mark", "（本章完）"), (200_002, "separator", "------")]


def test_a_long_line_is_never_removed_whole():
    line = (
        "　　" + "他说他喜欢看小说，每天都去那个网站，求一张月票，感谢每一个打赏的人。" * 12 + "他求推荐票，谢谢大家！"
    )
    assert what_stays(line) == (line, [])


def test_entities_and_tags_become_what_they_mean():
    cleaned = clean("<p>&ldquo;你好&hellip;&hellip;&rdquo;他说。<br/>&nbsp;&nbsp;A&amp;B</p>", RULES)
    assert [line.text.strip() for line in cleaned.lines if line.text] == ["“你好……”他说。", "A&B"]
    assert {line.number for line in cleaned.lines} == {1}


def test_punctuation_and_full_width_forms_stay_byte_for_byte():
    text = "“全角ＡＢＣ，１２３！”‘嗯’「好」『妙』《书》……——（笑）～·\u3000①Ⅳ㎏ﬁ"
    assert clean(text, RULES) == ([(1, text)], [])


PIECES = [
    *lines(TUNING_ADS),
    *lines(TUNING_PROSE),
    *"“”‘’「」『』（）()【】《》，。！…—\u3000 \t\n\u200b\ufeffａＷ",
    *("www", "．ｃｏｍ", "&nbsp;", "&amp;", "<br>", "<p>", "第三章 雨夜\n", "𠮷", "\ud800", "㏄", "\n----------\n"),
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join))
def test_nothing_is_lost_added_or_moved(text):
    assert_law(text, clean(text, RULES))


@pytest.mark.skipif(not NOVELS.is_dir(), reason="no real novels beside the checkout")
@pytest.mark.parametrize("path", sorted(NOVELS.glob("*.txt")), ids=lambda path: path.name)
def test_real_novels(path):
    text = path.read_bytes().decode(ENCODINGS[path.name.split(".")[-2]]).replace("\r\n", "\n").replace("\r", "\n")
    cleaned = clean(text, RULES)
    assert_law(text, cleaned)
    kept = "\n".join(line.text for line in cleaned.lines)
    gone = "".join(part.text for part in cleaned.removed)
    for mark in QUOTES:
        assert kept.count(mark) + gone.count(mark) == text.count(mark)
    assert len(bare(gone)) < 0.01 * len(bare(text))
    squeezed = "".join(filter(str.isalnum, kept)).lower()
    for word in (
        "www",
        "http",
        "txt",
        "bookbao",
        "rain8",
        "daocaoren",
        "xiaoshuo",
        "小说天堂",
        "下载",
        "更新时间",
        "版权声明",
        "本章完",
    ):
        assert word not in squeezed


def write_rules(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_user_adds_replaces_and_switches_off_rules(tmp_path):
    path = write_rules(
        tmp_path,
        "rules:\n- {name: my_site, where: line, contains: [青石], pattern: '青石斋.*'}\n"
        "- {name: separator, disabled: true}\n"
        "- {name: word_count, where: line, contains: [字数], pattern: '字数'}\n",
    )
    rules = load_rules([path])
    cleaned = clean("青石斋出品\n----------\n字数\n字数：3000", rules)
    assert [(part.rule, part.text) for part in cleaned.removed] == [("my_site", "青石斋出品"), ("word_count", "字数")]
    assert rules.digest != RULES.digest == load_rules().digest


def test_a_rule_without_words_is_tried_on_every_line(tmp_path):
    rules = load_rules([write_rules(tmp_path, "rules:\n- {name: every, pattern: '甲+乙'}\n")])
    assert clean("甲甲乙\n乙", rules).removed == [(1, "every", "甲甲乙")]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{name: x, pattern: a, colour: red}", "unknown key 'colour'"),
        ("{name: x, pattern: 'a('}", "its pattern"),
        ("{name: x, pattern: '(a+)+b'}", "too long"),
        ("{name: x, where: part, pattern: '(?:天|天地|地)*玄'}", "too long"),
        ("{name: x, pattern: a, longest: many}", "longest is 'many'"),
        ("{name: x, pattern: a, where: page}", "where is 'page'"),
        ("{name: x}", "no pattern"),
        ("{name: x, pattern: a}\n- {name: x, pattern: b}", "twice"),
        ("{name: x, pattern: a, pattern: b}", "twice"),
        ("{name: unknown, disabled: true}", "cannot be disabled"),
        ("{name: x, pattern: a, normalized: true, contains: ['W.W']}", "never contains"),
        ("{name: x, where: block, contains: [a], pattern: a}", "until"),
        ("just words", "no list of rules"),
    ],
)
def test_a_wrong_rule_is_refused_by_file_and_name(tmp_path, rule, words):
    path = write_rules(tmp_path, f"rules:\n- {rule}\n")
    with pytest.raises(UserError) as raised:
        load_rules([path])
    assert words in raised.value.cause and str(path) in raised.value.cause


def test_a_rule_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "absent.yaml", write_rules(tmp_path, "rules: [")):
        with pytest.raises(UserError, match=path.name):
            load_rules([path])
    assert RULES_FILE.is_file()


def test_simplified_on_request():
    assert to_simplified("「這個人說話」，乾隆年間的名著。") == "「这个人说话」，乾隆年间的名著。"
    assert to_simplified("他说“好”。……——ＡＢ") == "他说“好”。……——ＡＢ"
